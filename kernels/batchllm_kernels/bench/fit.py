"""Turns measured steps into the numbers that the cost gate decides by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import numpy.typing as npt

from batchllm_kernels.arrays import Floats
from batchllm_kernels.attention.cost import (
    KernelCalibration,
    Launching,
    StepWork,
    Traffic,
    calibration_for,
    shared_path_seconds,
)

SMALLEST_MINIMUM_GAIN = 0.05
ERRORS_BELOW_MINIMUM_GAIN = 0.9  # share of the measured steps
MOST_ROUNDS = 50
FASTEST = 1e18  # bytes or operations a second of what takes no time that can be measured


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """Seconds of one layer of a decode step by replay of a graph; None for what was not measured.

    Attributes:
        work: its traffic, by `step_traffic.step_work` with the cache and the processors of the device, in the order of
            the batch that was measured.
        stock: vLLM's own attention on the batch.
        shared: the shared launch alone.
        own: the own launch alone, with the partial results of the shared one.
        whole: all launches of ours.
    """

    work: StepWork
    stock: float | None = None
    shared: float | None = None
    own: float | None = None
    whole: float | None = None


def device_for_fit(*, l2_bytes: float, processors: int) -> KernelCalibration:
    """A device of which only its size is known, for `step_work` of the steps that are to be measured.

    Args:
        l2_bytes: of its second-level cache.
        processors: its multiprocessors.
    """
    return replace(calibration_for(""), source="to be measured", l2_bytes=l2_bytes, processors=processors)


def fit_calibration(
    source: str, measured: Sequence[MeasuredStep], device: KernelCalibration, *, uncaptured_launch_seconds: float
) -> KernelCalibration:
    """What a device reaches: the rates and fixed costs that explain measured steps with the least relative error.

    A rate that bounds none of the steps is the slowest that all of them allow. The minimum gain is what nine of ten
    steps were predicted to, and a twentieth at least. What a layer loses without graphs is not measured but taken over.

    Args:
        source: of the entry.
        measured: steps of all sizes, some in the order of groups and some with members apart.
        device: by which their traffic was counted, see `device_for_fit`.
        uncaptured_launch_seconds: fixed cost of a launch by the host, as the host was measured.

    Raises:
        ValueError: fewer than four measurements of the stock attention, of the shared launch or of the own launch.
    """
    stock = [(one.work.stock, one.stock) for one in measured if one.stock is not None]
    shared = [
        (one.work.shared, one.shared) for one in measured if one.shared is not None and one.work.shared is not None
    ]
    own = [(one.work.own, one.own) for one in measured if one.own is not None]
    for name, points in (("stock", stock), ("shared", shared), ("own", own)):
        if len(points) < 4:
            raise ValueError(f"measured: expected at least 4 points of the {name} attention, got {len(points)}")
    _, (from_memory, through_l2) = _fit_launch(*_columns(stock, ("first_bytes", "total_bytes")))
    shared_fixed, (shared_memory, _, shared_flops) = _fit_launch(
        *_columns(shared, ("first_bytes", "total_bytes", "flops")), known={1: through_l2}
    )
    own_fixed, (own_memory, _) = _fit_launch(*_columns(own, ("first_bytes", "total_bytes")), known={1: through_l2})
    fitted = KernelCalibration(
        source=source,
        stock_bytes_per_second=_rate(from_memory),
        l2_bytes_per_second=_rate(through_l2),
        l2_bytes=device.l2_bytes,
        processors=device.processors,
        shared_bytes_per_second=_rate(shared_memory),
        shared_flops_per_second=_rate(shared_flops),
        own_bytes_per_second=_rate(own_memory),
        captured_launch_seconds=max(shared_fixed, own_fixed),
        uncaptured_launch_seconds=uncaptured_launch_seconds,
        uncaptured_layer_seconds=device.uncaptured_layer_seconds,
        minimum_gain=SMALLEST_MINIMUM_GAIN,
    )
    errors = prediction_errors(measured, fitted)
    gain = float(np.quantile(np.abs(errors), ERRORS_BELOW_MINIMUM_GAIN))
    return replace(fitted, minimum_gain=round(max(gain, SMALLEST_MINIMUM_GAIN), 3))


def prediction_errors(measured: Sequence[MeasuredStep], calibration: KernelCalibration) -> Floats:
    """float64 [N]: predicted over measured seconds, less one, of the stock attention and of the whole of ours."""
    errors = []
    for one in measured:
        if one.stock is not None:
            predicted = calibration.captured_launch_seconds + calibration.stock_seconds(one.work.stock)
            errors.append(predicted / one.stock - 1)
        if one.whole is not None:
            errors.append(shared_path_seconds(one.work, Launching.CAPTURED, calibration) / one.whole - 1)
    return np.array(errors, dtype=np.float64)


def _columns(points: Sequence[tuple[Traffic, float]], names: tuple[str, ...]) -> tuple[Floats, Floats]:
    """float64 [N, terms] and seconds, float64 [N]."""
    terms = np.array([[getattr(traffic, name) for name in names] for traffic, _ in points], dtype=np.float64)
    return terms, np.array([seconds for _, seconds in points], dtype=np.float64)


def _fit_launch(terms: Floats, seconds: Floats, known: dict[int, float] | None = None) -> tuple[float, list[float]]:
    """A fixed cost, and the seconds of a unit of each term, so that fixed + the largest of the terms is the time.

    Which term is the largest at which point follows from the result, and the other way round: both in turns, from the
    slowest rates that the measured times allow.

    Args:
        terms: float64 [N, K].
        seconds: float64 [N].
        known: seconds of a unit of terms that are not to be fitted.
    """
    known = known or {}
    with np.errstate(divide="ignore"):
        most = np.min(seconds[:, None] / terms, axis=0)
    unit = np.array([known.get(term, value) for term, value in enumerate(most)])
    fixed, largest = 0.0, np.full(len(seconds), -1)
    for _ in range(MOST_ROUNDS):
        now = np.argmax(terms * unit, axis=1)
        if (now == largest).all():
            break
        largest = now
        fixed, unit = _fit_assigned(terms, seconds, largest, unit, known)
    return fixed, [float(value) for value in unit]


def _fit_assigned(
    terms: Floats, seconds: Floats, largest: npt.NDArray[np.int64], unit: Floats, known: dict[int, float]
) -> tuple[float, Floats]:
    """Least squares of relative errors with none negative, each point having one term; terms without points stay."""
    fitted = [term for term in range(terms.shape[1]) if term not in known and (largest == term).sum() > 1]
    columns = np.zeros((len(seconds), 1 + len(fitted)))
    columns[:, 0] = 1.0
    for place, term in enumerate(fitted, start=1):
        columns[:, place] = np.where(largest == term, terms[:, term], 0.0)
    rest = np.where(np.isin(largest, fitted), 0.0, terms[np.arange(len(seconds)), largest] * unit[largest])
    columns, target = columns / seconds[:, None], 1 - rest / seconds
    best, least = np.zeros(columns.shape[1]), np.inf
    # Four unknowns at the most: every choice of which are zero is tried.
    for size in range(1, columns.shape[1] + 1):
        for used in combinations(range(columns.shape[1]), size):
            solution = np.zeros(columns.shape[1])
            solution[list(used)] = np.linalg.lstsq(columns[:, used], target, rcond=None)[0]
            fault = float(np.square(columns @ solution - target).sum())
            if (solution >= 0).all() and fault < least:
                best, least = solution, fault
    updated = unit.copy()
    updated[fitted] = best[1:]
    return float(best[0]), updated


def _rate(seconds_of_a_unit: float) -> float:
    return min(1 / seconds_of_a_unit, FASTEST) if seconds_of_a_unit > 0 else FASTEST
