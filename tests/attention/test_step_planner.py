"""The planner of an engine's steps: plans where it pays, and looks rarely where it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from batchllm_kernels.attention import launch
from batchllm_kernels.attention.cost import KernelCalibration, Launching, ModelHeads, calibration_for
from batchllm_kernels.attention.plan_buffers import PlanBuffers
from batchllm_kernels.attention.step_planner import LONGEST_PAUSE, StepPlanner

from .batches import Request, Step

ASSUMED = calibration_for("a device nobody measured")


MODEL = ModelHeads(heads=32, kv_heads=8, head_size=128)


def planner(calibration: KernelCalibration = ASSUMED, *, layers: int = 32, host_hidden: bool = True) -> StepPlanner:
    cpu = torch.device("cpu")
    return StepPlanner(MODEL, layers, 16, torch.bfloat16, 32, calibration, cpu, host_hidden=host_hidden)


def look(at: StepPlanner, step: Step, *, prefill_rows: bool = False) -> PlanBuffers | None:
    launching = Launching.PIECES if prefill_rows else Launching.CAPTURED
    return at.plan(step.block_table, step.seq_lens, launching=launching, prefill_rows=prefill_rows)


SHARING = Step([Request(own_tokens=20, shares=(("prefix", 200),)) for _ in range(16)])
ALONE = Step([Request(own_tokens=300) for _ in range(16)])


def test_a_step_that_pays_gets_a_plan_in_the_same_buffers_every_time() -> None:
    made = planner()
    first = look(made, SHARING)
    assert first is not None
    assert first.plan is not None
    assert first.plan.shared_tokens == 3200
    assert made.decision is not None
    assert made.decision.share
    assert look(made, SHARING) is first


def test_steps_that_do_not_pay_are_looked_at_less_and_less() -> None:
    made = planner()
    looked_at = []
    for number in range(40):
        assert look(made, ALONE) is None
        if made.decision is not None:
            assert not made.decision.share
            looked_at.append(number)
    assert looked_at == [0, 2, 6, 14, 22, 30, 38]


def test_a_step_that_pays_ends_the_pauses() -> None:
    made = planner()
    for _ in range(7):
        look(made, ALONE)
    waited = 0
    while look(made, SHARING) is None:
        waited += 1
    assert waited < LONGEST_PAUSE
    assert look(made, SHARING) is not None
    assert look(made, ALONE) is None
    assert look(made, SHARING) is None
    assert look(made, SHARING) is not None


def test_steps_with_prompts_that_do_not_pay_keep_no_decode_step_from_sharing() -> None:
    made = planner()
    few = Step([*SHARING.requests[:2], *ALONE.requests[:2]])
    random = np.random.default_rng(0)
    shared = []
    for mixed in random.random(1000) < 0.42:
        plan = look(made, few if mixed else SHARING, prefill_rows=bool(mixed))
        if mixed:
            assert plan is None
        else:
            shared.append(plan is not None)
    assert 500 < len(shared) < 650
    assert all(shared)


def test_decode_steps_that_do_not_pay_keep_no_step_with_prompts_from_sharing() -> None:
    made = planner(replace(ASSUMED, uncaptured_launch_seconds=0.0))
    for _ in range(40):
        assert look(made, ALONE) is None
        assert look(made, SHARING, prefill_rows=True) is not None


def test_sharing_pays_for_the_hosts_plan_where_the_device_waits_for_it() -> None:
    for layers, share in ((2, False), (80, True)):
        assert look(planner(layers=layers), SHARING) is not None
        assert (look(planner(layers=layers, host_hidden=False), SHARING) is not None) == share


def test_a_plan_without_sharing_is_loaded_whatever_is_shared() -> None:
    made = planner()
    buffers = made.load_alone(SHARING.seq_lens)
    assert buffers.plan is not None
    assert buffers.plan.shared_tokens == 0
    assert buffers.plan.own_kv_tokens_read == int(SHARING.seq_lens.sum())
    assert look(made, SHARING) is buffers


def test_columns_beyond_the_longest_request_are_not_looked_at() -> None:
    wide = Step(SHARING.requests)
    wide.block_table = torch.nn.functional.pad(torch.from_numpy(wide.block_table), (0, 900), value=-1).numpy()
    assert look(planner(), wide) is not None


def test_models_that_the_kernels_do_not_support_are_refused() -> None:
    with pytest.raises(ValueError, match="head_size: expected 1 to 256, got 576"):
        StepPlanner(ModelHeads(16, 1, 576), 32, 16, torch.bfloat16, 32, ASSUMED, torch.device("cpu"))


def test_compiling_ahead_runs_every_kernel_and_leaves_the_planner_as_it_was(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = {
        name: getattr(launch, name) for name in ("attend_shared_kernel", "attend_own_kernel", "merge_splits_kernel")
    }
    ran = set()

    def counted(make: Any) -> Any:
        def make_launcher(kernel: Any, options: dict[str, Any]) -> launch.Launcher:
            run = make(kernel, options)

            def launcher(grid: tuple[int, int, int], arguments: tuple[Any, ...], aligned: bool) -> None:
                ran.add(next(name for name, one in kernels.items() if one is kernel))
                run(grid, arguments, aligned)

            return launcher

        return make_launcher

    for name in ("interpreted_launcher", "compiled_launcher"):
        monkeypatch.setattr(launch, name, counted(getattr(launch, name)))
    made = StepPlanner(ModelHeads(4, 2, 16, 4), 2, 16, torch.float32, 4, ASSUMED, device)
    made.compile_kernels()
    assert ran == set(kernels)
    assert made.decision is None
    assert made.load_alone(np.array([20, 3], dtype=np.int32)).plan is not None
