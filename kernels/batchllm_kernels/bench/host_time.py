"""Host time of our attention: what Python costs a layer, and a plan a step, without the work on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from batchllm_kernels.attention import launch
from batchllm_kernels.attention.plan_buffers import PlanBuffers
from batchllm_kernels.bench.grid import GridPoint
from batchllm_kernels.bench.layered_step import layered_step
from batchllm_kernels.bench.ours import our_call, plan_of

WITHOUT_LAUNCHES, WITH_LAUNCHES = "a layer, without launches", "a layer, with launches"
PLAN, LOAD = "a step, plan", "a step, load"

CALLS_OF_A_LAYER = 400
CALLS_OF_A_STEP = 40
ROUNDS = 7
SMALL = GridPoint(256, 4, own=32, requests=8)  # so little work that the device keeps up with the host
LARGE = GridPoint(2000, 16, own=200, requests=1024)


class _Compiled:
    """A compiled kernel that does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._run

    @staticmethod
    def _run(*_: object) -> None:
        return None


class _Kernel:
    """A kernel that is never compiled."""

    def __getitem__(self, grid: object) -> Callable[..., _Compiled]:
        return self._compile

    @staticmethod
    def _compile(*_: object, **__: object) -> _Compiled:
        return _Compiled()


@contextmanager
def without_launches() -> Iterator[None]:
    """Launches that are prepared meanwhile start nothing, so that only our own Python is measured, on any machine."""
    namespace = vars(launch)
    kernels = ("attend_shared_kernel", "attend_own_kernel", "merge_splits_kernel")
    replaced = {name: _Kernel() for name in kernels} | {
        "INTERPRETED": True,  # no device is asked for
        "interpreted_launcher": launch.compiled_launcher,
    }
    kept = {name: namespace[name] for name in replaced}
    namespace.update(replaced)
    try:
        yield
    finally:
        namespace.update(kept)


def layer_microseconds(device: torch.device) -> dict[str, float]:
    """Median host time of one layer's call: without launches, and on a CUDA device with them."""
    inputs = layered_step(SMALL, device, torch.bfloat16, layers=2)
    plan = plan_of(inputs, share=True)
    call = our_call(inputs, plan, every_launch=False)
    with without_launches():
        call(0)
        times = {WITHOUT_LAUNCHES: _microseconds(lambda: call(0), CALLS_OF_A_LAYER, device)}
    if device.type == "cuda":
        call = our_call(inputs, plan, every_launch=False)
        call(0)
        times[WITH_LAUNCHES] = _microseconds(lambda: call(0), CALLS_OF_A_LAYER, device)
    return times


def step_microseconds(device: torch.device) -> dict[str, float]:
    """Median host time of what a step pays once: the plan, and bringing it to the device; 1,024 requests in groups."""
    step = LARGE.step()
    inputs = layered_step(GridPoint(16, 1, own=16, requests=1), device, torch.bfloat16, layers=1)
    large = replace(inputs, point=LARGE, step=step)  # no plan looks at the tensors
    plan = plan_of(large, share=True)
    buffers = PlanBuffers.of_plan(plan, LARGE.heads, LARGE.head_size, device)
    return {
        PLAN: _microseconds(lambda: plan_of(large, share=True), CALLS_OF_A_STEP, device),
        LOAD: _microseconds(lambda: buffers.load(plan), CALLS_OF_A_STEP, device),
    }


def host_rows(device: torch.device) -> list[dict[str, Any]]:
    """Rows of the report."""
    times = layer_microseconds(device) | step_microseconds(device)
    return [{"what": name, "microseconds": time} for name, time in times.items()]


def _microseconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    times = []
    for _ in range(ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(1e6 * (time.perf_counter() - start) / calls)
    return median(times)
