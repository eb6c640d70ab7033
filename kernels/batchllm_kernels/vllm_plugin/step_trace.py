"""The step trace: one record for each step of an engine, in a local file that another process may read meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

STEP = np.dtype(
    [
        ("time_s", np.float64),  # since the epoch, when the step is scheduled
        ("step_seconds", np.float32),  # from the scheduling of the step before; 0 for the first step after a pause
        ("prefill_tokens", np.int32),
        ("decode_tokens", np.int32),
        ("running", np.int32),
        ("waiting", np.int32),
        ("kv_tokens_used", np.int64),
        ("kv_tokens_capacity", np.int64),
        ("preempted", np.int32),  # requests preempted in this step
    ]
)
"""The columns of a record."""


class StepTraceWriter:
    """Appends steps to a file.

    Args:
        path: the file to append to; it is created where it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._record = np.zeros(1, dtype=STEP)
        self._last = 0.0

    def write(
        self,
        *,
        prefill_tokens: int,
        decode_tokens: int,
        running: int,
        waiting: int,
        kv_tokens_used: int,
        kv_tokens_capacity: int,
        preempted: int,
    ) -> None:
        """Append a record of the step that is scheduled now."""
        now = time.time()
        seconds = now - self._last if self._last else 0.0
        tokens = (prefill_tokens, decode_tokens)
        self._record[0] = (now, seconds, *tokens, running, waiting, kv_tokens_used, kv_tokens_capacity, preempted)
        self._last = now
        # One write of one record: a reader never sees half of it.
        os.write(self._file, self._record.tobytes())

    def pause(self) -> None:
        """Take note that the engine has nothing to do: the time until the next step belongs to no step."""
        self._last = 0.0


def read_steps(path: Path, first: int = 0) -> npt.NDArray[np.void]:
    """The steps of a file from index `first` on, as a structured array [S] of `STEP`; empty where there is no file."""
    if not path.exists():
        return np.zeros(0, dtype=STEP)
    return np.fromfile(path, dtype=STEP, offset=first * STEP.itemsize)
