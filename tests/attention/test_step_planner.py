"""The planner of an engine's steps: plans where it pays, and looks rarely where it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from batchllm_kernels.attention.cost import Calibration, ModelHeads, calibration_for
from batchllm_kernels.attention.plan_buffers import PlanBuffers
from batchllm_kernels.attention.step_planner import StepLimits, StepPlanner

from .batches import Request, Step

LIMITS = StepLimits(max_tokens=256, max_requests=32)
ASSUMED = calibration_for("a device nobody measured")


def planner(limits: StepLimits = LIMITS, calibration: Calibration = ASSUMED) -> StepPlanner:
    model = ModelHeads(heads=32, kv_heads=8, head_size=128)
    return StepPlanner(model, 16, torch.bfloat16, limits, calibration, torch.device("cpu"))


def look(at: StepPlanner, step: Step) -> PlanBuffers | None:
    lengths = torch.from_numpy(step.seq_lens), torch.from_numpy(step.query_start_loc)
    return at.plan(step.block_table, *lengths, max_seq_len=int(step.seq_lens.max()))


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
    for number in range(60):
        assert look(made, ALONE) is None
        if made.decision is not None:
            assert not made.decision.share
            looked_at.append(number)
    assert looked_at == [0, 2, 6, 14, 30, 46]


def test_a_step_that_pays_ends_the_pauses() -> None:
    made = planner()
    for _ in range(7):
        look(made, ALONE)
    while look(made, SHARING) is None:
        pass
    assert look(made, SHARING) is not None
    assert look(made, ALONE) is None
    assert look(made, SHARING) is None
    assert look(made, SHARING) is not None


def test_a_plan_larger_than_the_buffers_is_left_to_the_stock_path() -> None:
    made = planner(StepLimits(max_tokens=2, max_requests=1), replace(ASSUMED, minimum_gain=-1e9))
    assert look(made, SHARING) is None
    assert made.decision is not None
    assert made.decision.reason == "the plan exceeds its buffers"


def test_columns_beyond_the_longest_request_are_not_looked_at() -> None:
    wide = Step(SHARING.requests)
    wide.block_table = torch.nn.functional.pad(torch.from_numpy(wide.block_table), (0, 900), value=-1).numpy()
    assert look(planner(), wide) is not None


def test_models_that_the_kernels_do_not_support_are_refused() -> None:
    with pytest.raises(ValueError, match="head_size: expected 1 to 256, got 576"):
        StepPlanner(ModelHeads(16, 1, 576), 16, torch.bfloat16, LIMITS, ASSUMED, torch.device("cpu"))
