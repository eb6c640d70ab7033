"""Shared parts by FlashAttention 3, for which a stand-in runs here: what is around it agrees with the reference."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from batchllm_kernels.attention.api import plan_shape, prefix_shared_attention
from batchllm_kernels.attention.cost import Launching, ModelHeads, calibration_for
from batchllm_kernels.attention.flash_shared import (
    FlashSettings,
    SequenceBounds,
    choose_shared_implementation,
    shared_sequences,
)
from batchllm_kernels.attention.plan_buffers import PlanBuffers, PlanCapacity
from batchllm_kernels.attention.step_planner import StepPlanner, step_capacity
from batchllm_kernels.attention.work_plan import OwnItem, WorkPlan, WorkPlanShape
from batchllm_kernels.bench.check import check, check_cases, poisoned_step
from batchllm_kernels.bench.grid import GridPoint
from batchllm_kernels.bench.ours import FLASH_IDLE, FLASH_LAUNCH, FLASH_OF_PLAN, FLASH_SHARED, flash_calls
from batchllm_kernels.bench.replay import replay_row
from batchllm_kernels.bench.setup import rehearsal_setup
from batchllm_kernels.bench.workloads import SharingRequest

from .batches import Request, Step, Tensors, mixed_requests, relative_error, tensors
from .plan_batches import batches, shapes
from .varlen_reference import ReferenceVarlenAttention

FLOAT16, BFLOAT16 = (torch.float16, 2e-3), (torch.bfloat16, 1e-2)
FLASH = "flash_attention_3"


def shape_of(numbers: Tensors, target_items: int | None = None) -> WorkPlanShape:
    return plan_shape(
        block_size=numbers.key_cache.shape[1],
        heads=numbers.query.shape[1],
        kv_heads=numbers.key_cache.shape[2],
        head_size=numbers.query.shape[2],
        dtype=numbers.query.dtype,
        device=numbers.query.device,
        target_items=target_items,
        shared_impl="flash_attention_3",
    )


def settings_of(numbers: Tensors, shape: WorkPlanShape, capacity: SequenceBounds) -> FlashSettings:
    return FlashSettings(
        ReferenceVarlenAttention(),
        shape,
        numbers.key_cache.shape[2],
        numbers.query.dtype,
        numbers.block_table.shape[1],
        capacity,
    )


def buffers_of(numbers: Tensors, shape: WorkPlanShape, requests: int) -> PlanBuffers:
    """Of the capacity that an engine of so many requests gives them, poisoned."""
    _, heads, head_size = numbers.query.shape
    flash = settings_of(numbers, shape, SequenceBounds.of_steps(requests, shape))
    capacity = PlanCapacity.of_steps(requests, shape)
    buffers = PlanBuffers(capacity, heads, head_size, numbers.query.device, flash=flash)
    poison(buffers)
    return buffers


def poison(buffers: PlanBuffers) -> None:
    buffers.partials.view(torch.int32).fill_(-1)  # NaN for 32 bits and for 16
    buffers.lses.fill_(torch.nan)


def attend(numbers: Tensors, buffers: PlanBuffers, *, every_launch: bool = False) -> torch.Tensor:
    output = torch.full_like(numbers.query, torch.nan)
    prefix_shared_attention(
        *numbers.rows,
        scale=numbers.scale,
        plan=buffers,
        impl="triton",
        shared_impl="flash_attention_3",
        output=output,
        every_launch=every_launch,
    )
    return output.float()


def attend_alone(numbers: Tensors, shape: WorkPlanShape, plan: WorkPlan) -> torch.Tensor:
    """With buffers that have room for just this plan."""
    _, heads, head_size = numbers.query.shape
    buffers = PlanBuffers.of_plan(
        plan,
        heads,
        head_size,
        numbers.query.device,
        flash=settings_of(numbers, shape, SequenceBounds.of_plan(plan)),
        block_table=numbers.block_table,
    )
    poison(buffers)
    return attend(numbers, buffers)


def four_levels() -> list[Request]:
    groups = {"system": 1, "template": 2, "document": 4, "chapter": 8}
    return [
        Request(own_tokens=1 + 7 * row, shares=tuple((f"{name} {row * n // 16}", 9) for name, n in groups.items()))
        for row in range(16)
    ]


@settings(max_examples=100, deadline=None)
@given(batches, shapes)
def test_every_slot_of_a_shared_part_is_the_result_of_one_row_over_its_keys(
    batch: list[Request], shape: WorkPlanShape
) -> None:
    step = Step(batch, block_size=shape.block_size)
    plan = step.plan(shape)
    made = shared_sequences(plan)
    expected = {}
    for row_start, row_count, request, kv_start, kv_end, split in plan.shared_items.tolist():
        for token, slot in plan.shared_rows[row_start : row_start + row_count].tolist():
            expected[slot + split] = token, step.block_table[request, kv_start // shape.block_size], kv_end - kv_start
    found = {}
    sequence_of_row = np.repeat(np.arange(len(made.seq_lens)), np.diff(made.query_start_loc))
    for slot in range(plan.own_partials, plan.partials):
        row = made.row_of_slot[slot]
        request, first_block = made.sources[sequence_of_row[row]]
        found[slot] = made.tokens[row], step.block_table[request, first_block], made.seq_lens[sequence_of_row[row]]
    assert found == expected
    assert len(made.tokens) == len(expected)


@settings(max_examples=200, deadline=None)
@given(batches, shapes)
def test_no_plan_exceeds_the_bounds_of_its_number_of_rows(batch: list[Request], shape: WorkPlanShape) -> None:
    plan = Step(batch, block_size=shape.block_size).plan(shape)
    exact = SequenceBounds.of_plan(plan)
    made = shared_sequences(plan)
    assert (exact.sequences, exact.rows) == (len(made.seq_lens), len(made.tokens))
    assert exact.longest_query == np.diff(made.query_start_loc).max(initial=0)
    bounds = SequenceBounds.of_steps(len(batch), shape)
    assert bounds.holds(exact)
    assert plan.own_partials <= PlanCapacity.of_steps(len(batch), shape).partials - bounds.rows


@pytest.mark.parametrize(("dtype", "tolerance"), [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("target_items", [1, 24, 200])
@pytest.mark.parametrize("requests", [mixed_requests(), four_levels()], ids=["two levels", "four levels"])
def test_decode_with_shared_and_own_context(
    device: torch.device, requests: list[Request], target_items: int, dtype: torch.dtype, tolerance: float
) -> None:
    step = Step(requests)
    numbers = tensors(step, heads=8, kv_heads=2, dtype=dtype, device=device)
    shape = replace(shape_of(numbers, target_items), minimum_split_tokens=16)
    plan = step.plan(shape)
    assert plan.shared_tokens
    assert relative_error(attend_alone(numbers, shape, plan), numbers.expected()) < tolerance


def test_splits_of_shared_runs_and_of_own_ranges_are_taken_in_together(device: torch.device) -> None:
    step = Step([Request(own_tokens=700 + n, shares=(("prefix", 40),)) for n in range(3)])
    numbers = tensors(step, head_size=32, dtype=torch.float16, device=device)
    shape = shape_of(numbers, 64)
    plan = step.plan(shape)
    assert SequenceBounds.of_plan(plan).sequences > 1
    assert len(plan.merges) == 3
    assert (plan.own_items[:, OwnItem.END_SLOT] - plan.own_items[:, OwnItem.FIRST_SLOT]).max() > 1
    assert relative_error(attend_alone(numbers, shape, plan), numbers.expected()) < 2e-3


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (6, 2), (8, 1), (32, 1)])
@pytest.mark.parametrize("head_size", [8, 64, 80, 256])
def test_heads_of_any_number_and_size(device: torch.device, heads: int, kv_heads: int, head_size: int) -> None:
    step = Step([*(Request(own_tokens=3 + 7 * n, shares=(("prefix", 8),)) for n in range(5)), Request(own_tokens=9)])
    numbers = tensors(step, heads=heads, kv_heads=kv_heads, head_size=head_size, dtype=torch.float16, device=device)
    shape = shape_of(numbers)
    plan = step.plan(shape)
    assert plan.shared_tokens
    assert relative_error(attend_alone(numbers, shape, plan), numbers.expected()) < 2e-3


@pytest.mark.parametrize("block_size", [16, 48, 64])
def test_block_sizes(device: torch.device, block_size: int) -> None:
    step = Step(four_levels(), block_size=block_size)
    numbers = tensors(step, head_size=16, dtype=torch.float16, device=device)
    shape = shape_of(numbers)
    assert relative_error(attend_alone(numbers, shape, step.plan(shape)), numbers.expected()) < 2e-3


def test_queries_that_lie_apart_in_memory_are_gathered(device: torch.device) -> None:
    step = Step(mixed_requests())
    numbers = tensors(step, head_size=16, dtype=torch.float16, device=device)
    apart = torch.full((len(numbers.query), 9, 24), torch.nan, dtype=torch.float16, device=device)
    apart[:, 1::2, :16] = numbers.query
    numbers.query = apart[:, 1::2, :16]
    shape = shape_of(numbers)
    assert relative_error(attend_alone(numbers, shape, step.plan(shape)), numbers.expected()) < 2e-3


def test_launches_that_are_captured_once_serve_every_plan_at_the_same_addresses(device: torch.device) -> None:
    """As a graph has it: launches for so many rows, older plans behind the counts, and steps that share nothing."""
    buffers: PlanBuffers | None = None
    calls = []
    for requests in (
        four_levels(),
        [Request(own_tokens=20)],
        mixed_requests(),
        [Request(own_tokens=1)],
        mixed_requests()[:6],
    ):
        padded = [*requests, *[Request(own_tokens=0)] * (17 - len(requests))]
        step = Step(padded)
        numbers = tensors(step, head_size=16, dtype=torch.float16, device=device)
        shape = shape_of(numbers, 8)
        if buffers is None:
            buffers = buffers_of(numbers, shape, 20)
            attention = buffers.flash.settings.attention  # type: ignore[union-attr]
        buffers.load(step.plan(shape), numbers.block_table, rows=17)
        poison(buffers)
        assert relative_error(attend(numbers, buffers, every_launch=True), numbers.expected()) < 2e-3
        calls.append((attention.addresses[-1], buffers.flash.bounds))  # type: ignore[union-attr]
    assert len(set(calls)) == 1


def test_a_plan_without_shared_parts_needs_no_call_where_launches_are_its_own(device: torch.device) -> None:
    step = Step([Request(own_tokens=20), Request(own_tokens=300)])
    numbers = tensors(step, head_size=16, dtype=torch.float16, device=device)
    shape = shape_of(numbers)
    buffers = buffers_of(numbers, shape, 4)
    buffers.load(step.plan(shape))
    assert relative_error(attend(numbers, buffers), numbers.expected()) < 2e-3
    assert not buffers.flash.settings.attention.addresses  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="every_launch: expected a plan loaded with `rows`"):
        attend(numbers, buffers, every_launch=True)


def test_smaller_launches_after_larger_ones_read_what_is_theirs(device: torch.device) -> None:
    buffers: PlanBuffers | None = None
    for requests in (four_levels(), mixed_requests(), four_levels()[:4]):
        step = Step(requests)
        numbers = tensors(step, head_size=16, dtype=torch.float16, device=device)
        shape = shape_of(numbers, 8)
        buffers = buffers or buffers_of(numbers, shape, 20)
        buffers.load(step.plan(shape), numbers.block_table)
        poison(buffers)
        assert relative_error(attend(numbers, buffers), numbers.expected()) < 2e-3


def test_the_implementation_is_the_one_that_buffers_are_made_for() -> None:
    step = Step(mixed_requests())
    numbers = tensors(step, dtype=torch.float16)
    shape = shape_of(numbers)
    buffers = buffers_of(numbers, shape, 16)
    buffers.load(step.plan(shape), numbers.block_table)
    with pytest.raises(ValueError, match="shared_impl: expected 'flash_attention_3', for which the buffers are made"):
        prefix_shared_attention(*numbers.rows, scale=1.0, plan=buffers, impl="triton")
    triton = PlanBuffers.of_plan(step.plan(numbers.shape()), 4, 64, torch.device("cpu"))
    with pytest.raises(ValueError, match="shared_impl: expected 'triton', for which the buffers are made"):
        attend(numbers, triton)


def test_what_does_not_fit_is_refused() -> None:
    step = Step(four_levels())
    numbers = tensors(step, dtype=torch.float16)
    shape = shape_of(numbers)
    plan = step.plan(shape)
    buffers = buffers_of(numbers, shape, 16)
    with pytest.raises(ValueError, match="block_table: expected that of the step"):
        buffers.load(plan)
    with pytest.raises(ValueError, match=re.escape("plan: expected at most SequenceBounds(")):
        buffers.load(plan, numbers.block_table, rows=2)
    small = settings_of(numbers, shape, SequenceBounds(1, 99, 99))
    with pytest.raises(ValueError, match=re.escape("plan: expected at most SequenceBounds(sequences=1")):
        PlanBuffers(PlanCapacity(99, 99, 99, 99, 199), 4, 64, torch.device("cpu"), flash=small).load(
            plan, numbers.block_table
        )
    with pytest.raises(ValueError, match="partials: expected at least 99 slots, got 98"):
        PlanBuffers(PlanCapacity(99, 99, 99, 99, 98), 4, 64, torch.device("cpu"), flash=small)
    with pytest.raises(ValueError, match="head_size: expected a multiple of 8, got 17"):
        PlanBuffers(PlanCapacity(99, 99, 99, 99, 199), 4, 17, torch.device("cpu"), flash=small)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        wide = replace(small, dtype=torch.float32)
        PlanBuffers(PlanCapacity(99, 99, 99, 99, 199), 4, 64, torch.device("cpu"), flash=wide)


def test_flash_attention_runs_the_shared_parts_where_there_is_one() -> None:
    hopper = {"compute_capability": 9, "dtype": torch.bfloat16, "head_size": 128, "missing": None}
    assert str(choose_shared_implementation(**hopper)).startswith("flash_attention_3 (")  # type: ignore[arg-type]
    for change, reason in (
        ({"compute_capability": 10}, "FlashAttention 3 needs compute capability 9, got 10"),
        ({"dtype": torch.float32}, "FlashAttention 3 needs numbers of 16 bits, got torch.float32"),
        ({"head_size": 100}, "FlashAttention 3 needs a multiple of 8 as head size, got 100"),
        ({"missing": "no library"}, "no library"),
    ):
        chosen = choose_shared_implementation(**(hopper | change))  # type: ignore[arg-type]
        assert (chosen.implementation, chosen.reason) == ("triton", reason)


def test_the_benchmark_checks_and_times_it_where_there_is_a_library(device: torch.device) -> None:
    case = replace(next(check_cases()), heads=2, kv_heads=1, head_size=16, padding=3)
    errors = check(case, device, ReferenceVarlenAttention())["errors"]
    assert set(errors) == {"shared", "unshared", FLASH_SHARED, FLASH_OF_PLAN}
    inputs = poisoned_step(case, device)
    calls = flash_calls(inputs, ReferenceVarlenAttention())
    inputs.output.fill_(torch.nan)
    assert set(calls) == {FLASH_SHARED, FLASH_OF_PLAN, FLASH_LAUNCH, FLASH_IDLE}
    assert calls[FLASH_LAUNCH](0).isnan().all(), "the output is that of own parts"
    assert calls[FLASH_IDLE](0).isnan().all(), "there is nothing to do"
    alone = replace(case, requests=(SharingRequest((), 65),))
    assert not flash_calls(poisoned_step(alone, device), ReferenceVarlenAttention())


def test_the_benchmark_replays_it_with_changed_plans(device: torch.device) -> None:
    setup = rehearsal_setup(None)
    library: Any = ReferenceVarlenAttention()
    point = GridPoint(48, 3, own=5, heads=2, kv_heads=1, head_size=16, requests=6)
    row = replay_row(replace(setup, dtype=torch.bfloat16, flash_attention_3=library, layers=1), point)
    assert len(row["relative_errors"]) == 12
    assert len(set(library.addresses)) == 1


def test_the_planner_of_an_engine_loads_plans_for_it(device: torch.device) -> None:
    """Captured for 20 rows, replayed with a plan that shares and one that does not, and a step of its own launches."""
    attention = ReferenceVarlenAttention()
    step = Step([*four_levels(), *[Request(own_tokens=0)] * 4])
    numbers = tensors(step, heads=4, head_size=16, dtype=torch.bfloat16, device=device)
    model = ModelHeads(4, 1, 16)
    always = replace(calibration_for("nobody's"), minimum_gain=-1e9)
    blocks = step.block_table.shape[1]
    engine = StepPlanner(
        model, 1, 16, torch.bfloat16, 20, always, device, shared_attention=attention, max_blocks=blocks
    )
    assert engine.shared_impl == "flash_attention_3"
    real = step.block_table[:16], step.seq_lens[:16]
    assert attend(numbers, engine.load_alone(real[1], rows=20), every_launch=True)[:16].isfinite().all()
    for rows in (20, None):
        kind = {"launching": Launching.CAPTURED if rows else Launching.PIECES, "prefill_rows": False}
        buffers = engine.plan(*real, **kind, device_table=numbers.block_table, rows=rows)  # type: ignore[arg-type]
        assert buffers is not None
        assert buffers.plan is not None
        assert buffers.plan.shared_tokens
        output = attend(numbers, buffers, every_launch=rows is not None)
        assert relative_error(output, numbers.expected()) < 1e-2
    alone = engine.load_alone(real[1], rows=20)
    assert relative_error(attend(numbers, alone, every_launch=True), numbers.expected()) < 1e-2
    captured = attention.addresses[0]
    assert attention.addresses[1] == attention.addresses[-1] == captured
    capacity = step_capacity(model, 16, torch.bfloat16, 20, device, shared_impl="flash_attention_3")
    assert buffers.partials.shape == capacity.scratch(4, 16)["partials"]
