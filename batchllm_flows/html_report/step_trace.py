"""What the engines did step by step, drawn together to as many points as a plot can show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from batchllm_operators.columns.arrays import Floats
from batchllm_operators.store import Store
from batchllm_operators.work.traces import read_steps

MOST_POINTS = 240
SHORTEST_POINT_SECONDS = 1 / 64

_TOKENS = ("prefill_tokens", "decode_tokens")
_REQUESTS = ("running", "waiting")
_COLUMNS = ("time_s", "step_seconds", *_TOKENS, *_REQUESTS, "kv_tokens_used", "kv_tokens_capacity", "preempted")


@dataclass(frozen=True, slots=True)
class StepTrace:
    """Steps of all engines of a run, in at most `MOST_POINTS` points of equal duration, those without a step left out.

    Attributes:
        seconds: float64 [P], begin of each point, since the first.
        point_seconds: duration of a point.
        prefill_tokens: float64 [P], mean of a step.
        decode_tokens: float64 [P], mean of a step.
        running: float64 [P], requests, mean of a step.
        waiting: float64 [P], requests, mean of a step.
        kv_use: float64 [P], share of the KV cache, mean of a step.
        kv_most: float64 [P], the largest such share.
        steps: of all points together.
        preempted: requests, of all points together.
        step_seconds: of all points together, summed over the engines.
        tokens: of all points together.
    """

    seconds: Floats
    point_seconds: float
    prefill_tokens: Floats
    decode_tokens: Floats
    running: Floats
    waiting: Floats
    kv_use: Floats
    kv_most: Floats
    steps: int
    preempted: int
    step_seconds: float
    tokens: int


def read_step_trace(work: Store, *, since: float) -> tuple[StepTrace | None, list[str]]:
    """The steps that engines made after a moment; in bounded memory, however many there are.

    Args:
        work: the work folder.
        since: seconds since the epoch; steps of earlier runs of the job are left out.

    Returns:
        The trace, or None where there is no such step; and what could not be read.
    """
    points = _Points()
    unreadable = read_steps(work, _COLUMNS, lambda batch: points.add(_columns(batch), since))
    return points.trace(), unreadable


class _Points:
    """Sums of the steps by point of time; points are drawn together in pairs when they become too many."""

    def __init__(self) -> None:
        self._width = SHORTEST_POINT_SECONDS
        self._number = np.zeros(0, dtype=np.int64)
        self._sums = np.zeros((0, 9))
        self._kv_most = np.zeros(0)

    def add(self, step: dict[str, Floats], since: float) -> None:
        taken = step["time_s"] > since
        if not taken.any():
            return
        capacity = step["kv_tokens_capacity"]
        kv_use = np.divide(step["kv_tokens_used"], capacity, out=np.zeros(len(capacity)), where=capacity > 0)
        values = [np.ones(len(kv_use)), *(step[name] for name in (*_TOKENS, *_REQUESTS)), kv_use]
        values += [step["preempted"], step["step_seconds"], step["prefill_tokens"] + step["decode_tokens"]]
        number = np.concatenate((self._number, np.floor(step["time_s"][taken] / self._width).astype(np.int64)))
        while number.max() - number.min() >= MOST_POINTS:
            number >>= 1
            self._width *= 2
        self._number, place = np.unique(number, return_inverse=True)
        sums, kv_most = np.zeros((len(self._number), len(values))), np.zeros(len(self._number))
        np.add.at(sums, place, np.concatenate((self._sums, np.stack(values, axis=1)[taken])))
        np.maximum.at(kv_most, place, np.concatenate((self._kv_most, kv_use[taken])))
        self._sums, self._kv_most = sums, kv_most

    def trace(self) -> StepTrace | None:
        if len(self._number) == 0:
            return None
        steps, prefill, decode, running, waiting, kv_use, preempted, seconds, tokens = self._sums.T
        return StepTrace(
            seconds=(self._number - self._number[0]) * self._width,
            point_seconds=self._width,
            prefill_tokens=prefill / steps,
            decode_tokens=decode / steps,
            running=running / steps,
            waiting=waiting / steps,
            kv_use=kv_use / steps,
            kv_most=self._kv_most,
            steps=int(steps.sum()),
            preempted=int(preempted.sum()),
            step_seconds=float(seconds.sum()),
            tokens=int(tokens.sum()),
        )


def _columns(batch: pa.RecordBatch) -> dict[str, Floats]:
    return {name: batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False) for name in _COLUMNS}
