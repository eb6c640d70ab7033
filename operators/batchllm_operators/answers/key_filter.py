"""A Bloom filter over request keys: whether a segment can hold any of the keys that are looked for."""

from __future__ import annotations

import numpy as np

from batchllm_operators.columns.arrays import Bools, Int64s, UInt64s

BITS_PER_KEY = 10
PROBES = 7
"""With 10 bits a key, 7 probes take fewest false keys for true ones: about 1 %."""

LEAST_BITS = 1024
"""A filter has at least so many."""


class KeyFilter:
    """Keys, of which it is known for sure only that others are not among them.

    Request keys are hashes, so that their words serve as the hashes of the filter.

    Args:
        bits: uint8, the filter as `content` gives it.
    """

    def __init__(self, bits: bytes) -> None:
        self._bits = np.frombuffer(bits, dtype=np.uint8)

    @classmethod
    def of(cls, keys: UInt64s) -> KeyFilter:
        """The filter of these keys, uint64 [N, 2]; it takes `BITS_PER_KEY` bytes a key while it is made."""
        size = -(-max(BITS_PER_KEY * len(keys), LEAST_BITS) // 8) * 8
        flags = np.zeros(size, dtype=np.bool_)
        for number in range(PROBES):
            flags[_places(keys, number, size)] = True
        return cls(np.packbits(flags).tobytes())

    @property
    def content(self) -> bytes:
        """The filter as bytes."""
        return self._bits.tobytes()

    def may_have(self, keys: UInt64s) -> Bools:
        """Whether each of these keys may be among those of the filter; False is certain."""
        size = 8 * len(self._bits)
        found = np.ones(len(keys), dtype=np.bool_)
        for number in range(PROBES):
            places = _places(keys, number, size)
            found &= (self._bits[places >> 3] >> (7 - (places & 7)).astype(np.uint8)) & 1 == 1
        return found


def _places(keys: UInt64s, number: int, size: int) -> Int64s:
    """The bit of each key in one probe, by double hashing."""
    hashes = keys[:, 0] + np.uint64(number) * (keys[:, 1] | np.uint64(1))
    return (hashes % np.uint64(size)).astype(np.int64)
