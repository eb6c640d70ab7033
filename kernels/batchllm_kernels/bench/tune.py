"""Search for launch parameters on a device, once, offline: for the shared and the own launch apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from math import exp, log
from statistics import mean
from typing import Any, Literal

from batchllm_kernels.attention.tuning import OwnTuning, SharedTuning, Tuning
from batchllm_kernels.bench.grid import GridPoint
from batchllm_kernels.bench.layered_step import LayeredStep, layered_step
from batchllm_kernels.bench.measure import checked_errors
from batchllm_kernels.bench.ours import OWN_LAUNCH, SHARED_LAUNCH, plan_of, tuned_call, tuning_of
from batchllm_kernels.bench.results import Row
from batchllm_kernels.bench.setup import REHEARSED_POINTS, Setup

Kernel = Literal["shared", "own"]
LAUNCHES: dict[Kernel, str] = {"shared": SHARED_LAUNCH, "own": OWN_LAUNCH}

# one head count, so that a candidate is compiled once
POINTS: dict[Kernel, tuple[GridPoint, ...]] = {
    "shared": (
        GridPoint(2000, 16, requests=256),
        GridPoint(4096, 64, requests=512),
        GridPoint(16000, 256, requests=256),
    ),
    "own": (GridPoint(2000, 16, requests=512), GridPoint(2000, 1, requests=256), GridPoint(2000, 1, requests=16)),
}
SMALL_POINT = GridPoint(512, 16, own=40, requests=32)  # to compile a candidate, and see that it is right


@dataclass(frozen=True, slots=True)
class Candidate:
    """Launch parameters of one kernel.

    Attributes:
        kernel: that they are for.
        tuning: with those parameters, and the table's for the other kernel.
    """

    kernel: Kernel
    tuning: Tuning

    @property
    def parameters(self) -> dict[str, int]:
        """The launch parameters of its kernel."""
        return asdict(self.tuning.shared if self.kernel == "shared" else self.tuning.own)

    @property
    def key(self) -> str:
        """Its name in a file of results."""
        return f"{self.kernel} " + " ".join(f"{name}={value}" for name, value in self.parameters.items())


def candidates(setup: Setup, *, quick: bool = False) -> dict[str, Candidate]:
    """What to try, by a name each: the table's entries, then the likely ones; `quick` tries few."""
    table = tuning_of(_points(setup, "own")[0], setup.device, setup.dtype)
    made = [Candidate("own", table), Candidate("shared", table)]
    if not setup.rehearsal:
        own = [Candidate("own", replace(table, own=one)) for one in own_candidates(quick=quick)]
        shared = [Candidate("shared", replace(table, shared=one)) for one in shared_candidates(quick=quick)]
        # in turns, so that a search that is cut off has tried some of both
        made += [one for pair in zip(own, shared, strict=False) for one in pair]
        made += own[len(shared) :] + shared[len(own) :]
    return {one.key: one for one in made}


def own_candidates(*, quick: bool) -> Iterator[OwnTuning]:
    """For the own launch."""
    if quick:
        for kv_tile, warps, stages in (
            (16, 1, 6), (16, 1, 8), (16, 2, 6), (16, 1, 4), (16, 4, 6), (16, 2, 4), (16, 2, 8), (16, 4, 4),
        ):  # fmt: skip
            yield OwnTuning(kv_tile, warps, stages)
        return
    for kv_tile, warps, stages in product((16, 32), (1, 2, 4), (4, 6, 3, 5, 8, 2)):
        yield OwnTuning(kv_tile, warps, stages)


def shared_candidates(*, quick: bool) -> Iterator[SharedTuning]:
    """For the shared launch."""
    if quick:
        for low, high, kv_tile, warps, low_stages, high_stages, programs in (
            (64, 64, 64, 4, 3, 3, 2), (64, 128, 64, 8, 3, 2, 2), (64, 64, 32, 4, 4, 4, 3), (64, 128, 64, 8, 3, 3, 1),
            (64, 64, 64, 4, 2, 2, 3), (64, 128, 32, 8, 4, 3, 2), (64, 64, 32, 4, 3, 3, 4), (64, 128, 128, 8, 2, 2, 1),
        ):  # fmt: skip
            yield SharedTuning(low, high, kv_tile, warps, low_stages, high_stages, programs)
        return
    for (low, high), warps, kv_tile, stages, programs in product(
        ((64, 128), (64, 64), (32, 64), (16, 64), (128, 128)), (4, 8), (64, 32, 128), (3, 2, 4), (2, 1, 3)
    ):
        yield SharedTuning(low, high, kv_tile, warps, stages, stages, programs)


def compiled(setup: Setup, candidate: Candidate) -> Row:
    """Compiles a candidate and runs it once.

    Raises:
        WrongResultError: when the result is wrong.
    """
    point = REHEARSED_POINTS[0] if setup.rehearsal else SMALL_POINT
    inputs = layered_step(point, setup.device, setup.dtype, layers=1)
    return {"errors": checked_errors({candidate.key: _whole(inputs, candidate)}, inputs)}


def measured(setup: Setup, candidate: Candidate) -> Row:
    """Microseconds of the candidate's launch alone on each point.

    Raises:
        WrongResultError: when a result is wrong.
    """
    times = {}
    for point in _points(setup, candidate.kernel):
        inputs = _inputs(setup, point)
        checked_errors({candidate.key: _whole(inputs, candidate)}, inputs)
        plan = plan_of(inputs, share=True, tuning=candidate.tuning)
        alone = tuned_call(inputs, plan, candidate.tuning, only=LAUNCHES[candidate.kernel])
        times[point.key] = setup.timer({candidate.key: alone}, inputs.layers)[candidate.key]
    return {"kernel": candidate.kernel, "parameters": candidate.parameters, "microseconds": times}


def best(rows: Sequence[Row]) -> dict[str, Any]:
    """For each kernel the parameters with the least geometric mean of their times, each relative to its point's best.

    Raises:
        ValueError: when a kernel has none.
    """
    entry: dict[str, Any] = {}
    for kernel in LAUNCHES:
        tried = [row for row in rows if row["kernel"] == kernel]
        if not tried:
            raise ValueError(f"{kernel}: expected candidates that were measured, got none")
        entry[kernel] = min(tried, key=lambda row, tried=tried: _relative_time(row, tried))["parameters"]  # type: ignore[misc]
    return entry


def _relative_time(row: Row, tried: Sequence[Row]) -> float:
    times: dict[str, float] = row["microseconds"]
    least = {point: min(other["microseconds"][point] for other in tried) for point in times}
    return exp(mean(log(time / least[point]) for point, time in times.items()))


def _points(setup: Setup, kernel: Kernel) -> tuple[GridPoint, ...]:
    return REHEARSED_POINTS if setup.rehearsal else POINTS[kernel]


def _whole(inputs: LayeredStep, candidate: Candidate) -> Any:
    return tuned_call(inputs, plan_of(inputs, share=True, tuning=candidate.tuning), candidate.tuning)


@cache
def _inputs(setup: Setup, point: GridPoint) -> LayeredStep:
    """One step for all candidates of a process."""
    return layered_step(point, setup.device, setup.dtype, layers=setup.layers)
