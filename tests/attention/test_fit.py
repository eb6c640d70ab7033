"""A calibration is found again from the times that it predicts, on steps as a device would be measured with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from batchllm_kernels.attention.cost import KernelCalibration, Launching, ModelHeads, shared_path_seconds
from batchllm_kernels.attention.step_traffic import step_work
from batchllm_kernels.attention.work_plan import WorkPlanShape, plan_work
from batchllm_kernels.bench.fit import MeasuredStep, device_for_fit, fit_calibration, prediction_errors
from batchllm_kernels.bench.workloads import decode_step, groups

SHAPE = WorkPlanShape(block_size=16, queries_per_kv_head=4)
HEADS = ModelHeads(heads=32, kv_heads=8, head_size=128)
DEVICE = device_for_fit(l2_bytes=50e6, processors=132)
KNOWN = replace(
    DEVICE,
    source="told",
    stock_bytes_per_second=2.7e12,
    l2_bytes_per_second=5.9e12,
    shared_bytes_per_second=2.2e12,
    shared_flops_per_second=2.5e14,
    own_bytes_per_second=2.45e12,
    captured_launch_seconds=1.7e-6,
    uncaptured_launch_seconds=5e-6,
    minimum_gain=0.05,
)
RATES = ("stock_bytes_per_second", "l2_bytes_per_second", "shared_bytes_per_second", "shared_flops_per_second",
         "own_bytes_per_second", "captured_launch_seconds")  # fmt: skip


def steps(*, prefixes: tuple[int, ...] = (256, 2000, 16_000)) -> Iterator[MeasuredStep]:
    """Small and large steps in the order of groups and shuffled, without times."""
    random = np.random.default_rng(0)
    for prefix, degree, requests, shuffled in product(prefixes, (2, 16, 64), (64, 256), (False, True)):
        count = max(1, requests // degree)
        made = decode_step("step", groups(count, prefix=prefix, own=200, degree=degree), 16)
        order = random.permutation(count * degree) if shuffled else np.arange(count * degree)
        lengths = made.seq_lens[order]
        yield MeasuredStep(step_work(plan_work(made.block_table[order], lengths, SHAPE), lengths, HEADS, DEVICE))


def timed(one: MeasuredStep, device: KernelCalibration, noise: float = 0.0, seed: int = 0) -> MeasuredStep:
    """With the times that a device would take, off by some per cent."""
    random = np.random.default_rng(seed)
    launch, work = device.captured_launch_seconds, one.work
    assert work.shared is not None
    exact = (
        launch + device.stock_seconds(work.stock),
        launch + device.shared_seconds(work.shared),
        launch + device.own_seconds(work.own),
        shared_path_seconds(work, Launching.CAPTURED, device),
    )
    return MeasuredStep(work, *(seconds * random.uniform(1 - noise, 1 + noise) for seconds in exact))


def fitted(measured: list[MeasuredStep]) -> KernelCalibration:
    return fit_calibration("told", measured, DEVICE, uncaptured_launch_seconds=5e-6)


def test_exact_times_give_the_device_back() -> None:
    measured = [timed(one, KNOWN) for one in steps()]
    found = fitted(measured)
    for name in RATES:
        assert getattr(found, name) == pytest.approx(getattr(KNOWN, name), rel=1e-6), name
    assert (found.source, found.l2_bytes, found.processors) == ("told", 50e6, 132)
    assert found.minimum_gain == 0.05
    assert np.abs(prediction_errors(measured, found)).max() < 1e-6


def test_times_that_are_off_by_some_per_cent_give_rates_that_are_off_by_some_per_cent() -> None:
    found = fitted([timed(one, KNOWN, 0.03, seed) for seed, one in enumerate(steps())])
    for name in RATES[:-1]:
        assert getattr(found, name) == pytest.approx(getattr(KNOWN, name), rel=0.05), name
    assert found.captured_launch_seconds == pytest.approx(KNOWN.captured_launch_seconds, rel=0.5)


def test_the_gate_asks_for_more_than_the_prediction_is_off_by() -> None:
    found = fitted([timed(one, KNOWN, 0.3, seed) for seed, one in enumerate(steps())])
    assert 0.15 < found.minimum_gain < 0.4


def test_a_rate_that_bounds_no_step_is_the_slowest_that_all_of_them_allow() -> None:
    arithmetic_is_free = replace(KNOWN, shared_flops_per_second=1e17)
    found = fitted([timed(one, arithmetic_is_free) for one in steps()])
    assert KNOWN.shared_flops_per_second / 2 < found.shared_flops_per_second < 1e17
    assert found.shared_bytes_per_second == pytest.approx(KNOWN.shared_bytes_per_second, rel=0.05)


def test_too_few_measurements_are_refused_with_what_is_missing() -> None:
    measured = [timed(one, KNOWN) for one in steps()]
    no_own = [replace(one, own=None) if place else one for place, one in enumerate(measured)]
    with pytest.raises(ValueError, match="expected at least 4 points of the own attention, got 1"):
        fitted(no_own)
    with pytest.raises(ValueError, match="expected at least 4 points of the stock attention, got 3"):
        fitted(measured[:3])
