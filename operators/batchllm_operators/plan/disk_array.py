"""Arrays on the local disk while the plan is made, so that memory holds counts and little more."""

from __future__ import annotations

import mmap
import tempfile
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from batchllm_operators.columns.arrays import Int32s, Int64s
from batchllm_operators.columns.compiled import compiled


class DiskArray:
    """An array in a temporary file that is gone when it is closed; written once, then read at any place.

    The file stands in the folder of temporary files (`TMPDIR`).

    Args:
        dtype: of the elements.
    """

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile(prefix="batchllm-plan-")  # noqa: SIM115 - closed by __exit__
        self._map: mmap.mmap | None = None
        self._bytes = 0

    def __enter__(self) -> DiskArray:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, values: npt.NDArray[Any]) -> None:
        """Write values after those that stand there."""
        content = np.ascontiguousarray(values, dtype=self._dtype)
        self._file.write(content.data)
        self._bytes += content.nbytes

    def values(self) -> npt.NDArray[Any]:
        """All values written so far, read-only, [n]; pages are read from the file as they are touched."""
        if self._bytes == 0:
            return np.zeros(0, dtype=self._dtype)
        if self._map is None or len(self._map) < self._bytes:
            self._file.flush()
            self._map = mmap.mmap(self._file.fileno(), self._bytes, prot=mmap.PROT_READ)
        return np.frombuffer(self._map, dtype=self._dtype)

    def forget(self) -> None:
        """Give back the memory of the pages read so far; they can be read again."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


class TokenSpool(DiskArray):
    """The token ids of all prompts: 4 bytes a token."""

    def __init__(self) -> None:
        super().__init__(np.int32)

    def __enter__(self) -> TokenSpool:
        return self

    def gather(self, starts: Int64s, lengths: Int32s) -> tuple[Int32s, Int32s]:
        """The prompts at some places, one after the other.

        Args:
            starts: int64 [N], first token of each prompt.
            lengths: int32 [N].

        Returns:
            The tokens, and int32 [N + 1] offsets into them.
        """
        offsets = np.zeros(len(starts) + 1, dtype=np.int32)
        np.cumsum(lengths, out=offsets[1:])
        gathered = np.empty(int(offsets[-1]), dtype=np.int32)
        _gather(self.values(), starts, offsets, gathered)
        self.forget()
        return gathered, offsets


@compiled
def _gather(tokens: Int32s, starts: Int64s, offsets: Int32s, gathered: Int32s) -> None:
    for prompt in range(len(starts)):
        begin = offsets[prompt]
        for token in range(offsets[prompt + 1] - begin):
            gathered[begin + token] = tokens[starts[prompt] + token]
