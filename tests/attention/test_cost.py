"""Steps share where it is expected to pay, and the numbers behind it are those of the plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from batchllm_kernels.attention.cost import Decision, ModelHeads, calibration_for, decide, planned_cost, stock_cost
from batchllm_kernels.attention.work_plan import PlanShape

from .batches import Request, Step

SHAPE = PlanShape(block_size=16, queries_per_kv_head=4)
HEADS = ModelHeads(heads=32, kv_heads=8, head_size=128)


def decision(step: Step, **changes: float) -> Decision:
    plan = step.plan(SHAPE)
    lengths = step.seq_lens, step.query_start_loc
    calibration = replace(calibration_for("a device nobody measured"), **changes)  # type: ignore[arg-type]
    return decide(plan, planned_cost(plan, *lengths, HEADS), stock_cost(*lengths, SHAPE, HEADS), calibration)


def groups(count: int, *, degree: int = 16, blocks: int = 125, own: int = 200) -> Step:
    return Step(
        [Request(own_tokens=own, shares=((f"prefix {g}", blocks),)) for g in range(count) for _ in range(degree)]
    )


def test_long_prefixes_of_many_requests_are_shared() -> None:
    made = decision(groups(16))
    assert made.share
    assert made.shared_seconds < made.stock_seconds / 2


def test_a_step_without_sharing_stays_on_the_stock_path() -> None:
    made = decision(Step([Request(own_tokens=300) for _ in range(64)]))
    assert not made.share
    assert made.reason == "nothing worth sharing"


def test_short_prefixes_stay_on_the_stock_path() -> None:
    made = decision(groups(4, degree=4, blocks=6, own=500))
    assert not made.share
    assert "needed 10.0%" in made.reason


def test_a_gain_below_the_minimum_is_not_worth_leaving_the_stock_path() -> None:
    made = decision(groups(16))
    gain = 1 - made.shared_seconds / made.stock_seconds
    assert decision(groups(16), minimum_gain=gain - 0.01).share
    assert not decision(groups(16), minimum_gain=gain + 0.01).share


def test_a_small_step_does_not_pay_for_a_second_launch() -> None:
    step = groups(1, degree=4, blocks=40, own=20)
    assert not decision(step).share
    assert decision(step, shared_overhead_seconds=0.0).share


def test_steps_bound_by_arithmetic_stay_on_the_stock_path() -> None:
    assert not decision(groups(16), stock_flops_per_second=1e12, shared_flops_per_second=1e12).share


def test_devices_that_were_not_measured_say_so() -> None:
    assert calibration_for("a device nobody measured").source == "assumed, not measured"


def test_the_stock_path_reads_what_a_plan_without_sharing_reads() -> None:
    step = groups(2, degree=3, blocks=4, own=60)
    plan = step.plan(SHAPE, share=False)
    stock = stock_cost(step.seq_lens, step.query_start_loc, SHAPE, HEADS)
    assert stock == planned_cost(plan, step.seq_lens, step.query_start_loc, HEADS)


def test_arithmetic_counts_every_key_that_a_token_sees() -> None:
    lengths = np.array([10, 7], dtype=np.int32), np.array([0, 3, 4], dtype=np.int32)
    keys_seen = (8 + 9 + 10) + 7
    assert stock_cost(*lengths, SHAPE, HEADS).flops == 4 * 32 * 128 * keys_seen
