"""Plans on the device: fixed addresses, one upload, and room for whatever an engine's steps may need."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm_kernels.attention.plan_buffers import PlanBuffers, PlanCapacity
from batchllm_kernels.attention.work_plan import WorkPlanShape

from .batches import Request, Step, mixed_requests
from .plan_batches import batches, shapes

SHAPE = WorkPlanShape(block_size=16, queries_per_kv_head=4, minimum_split_tokens=16)
TABLES = ("own_items", "merges", "shared_items", "shared_rows")


def buffers(capacity: PlanCapacity) -> PlanBuffers:
    return PlanBuffers(capacity, heads=4, head_size=64, device=torch.device("cpu"))


@settings(max_examples=200, deadline=None)
@given(batches, shapes, st.booleans())
def test_every_plan_of_so_many_rows_fits_the_capacity(batch: list[Request], shape: WorkPlanShape, share: bool) -> None:
    plan = Step(batch, block_size=shape.block_size).plan(shape, share=share)
    assert PlanCapacity.of_steps(len(batch), shape).holds(plan)


@pytest.mark.parametrize("degree", [2, 3, 5, 15])
@pytest.mark.parametrize("target_items", [1, 16, 64])
def test_plans_that_share_on_every_level_and_split_everything_fit_the_capacity(degree: int, target_items: int) -> None:
    rows = 8 * degree
    groups = {"system": 1, "template": 2, "document": 4, "chapter": 8}
    step = Step(
        [
            Request(own_tokens=800, shares=tuple((f"{name} {row * n // rows}", 100) for name, n in groups.items()))
            for row in range(rows)
        ]
    )
    shape = WorkPlanShape(
        16, 4, shared_tile_rows=512, target_items=target_items, own_target_items=target_items, minimum_split_tokens=16
    )
    plan = step.plan(shape)
    assert len(plan.nodes) == sum(groups.values())
    assert len(plan.shared_rows) == 4 * rows
    assert PlanCapacity.of_steps(rows, shape).holds(plan)


def test_a_loaded_plan_stands_in_the_tables_with_the_counts_beside_them() -> None:
    made = buffers(PlanCapacity.of_steps(16, SHAPE))
    for requests in (mixed_requests(), [Request(own_tokens=900)], [Request(own_tokens=20)] * 5, []):
        plan = Step(requests).plan(SHAPE)
        made.load(plan)
        assert made.plan is plan
        assert made.counts.tolist() == [len(plan.shared_items), len(plan.own_items), len(plan.merges), 0]
        for name in TABLES:
            table = getattr(plan, name)
            assert getattr(made, name)[: len(table)].tolist() == table.tolist()


def test_tables_keep_their_addresses_in_one_buffer() -> None:
    made = buffers(PlanCapacity.of_steps(16, SHAPE))
    tables = [made.counts, *(getattr(made, name) for name in TABLES)]
    addresses = [table.data_ptr() for table in tables]
    assert len({table.untyped_storage().data_ptr() for table in tables}) == 1
    assert all((address - addresses[0]) % 128 == 0 for address in addresses)
    made.load(Step(mixed_requests()).plan(SHAPE))
    assert [table.data_ptr() for table in (made.counts, *(getattr(made, name) for name in TABLES))] == addresses


def test_buffers_of_a_plan_hold_just_that() -> None:
    plan = Step(mixed_requests()).plan(SHAPE)
    made = PlanBuffers.of_plan(plan, 4, 64, torch.device("cpu"))
    assert made.shared_items.tolist() == plan.shared_items.tolist()
    assert made.partials.shape == (plan.partials, 4, 64)
    assert made.lses.shape == (plan.partials, 4)


@pytest.mark.parametrize("name", ["shared_items", "shared_rows", "own_items", "merges", "partials"])
def test_a_plan_that_does_not_fit_is_refused(name: str) -> None:
    plan = Step([Request(own_tokens=900, shares=(("prefix", 20),)) for _ in range(3)]).plan(SHAPE)
    sizes = {"shared_items": 99, "shared_rows": 99, "own_items": 999, "merges": 99, "partials": 999}
    assert PlanCapacity(**sizes).holds(plan)
    too_small = PlanCapacity(**{**sizes, name: 1})
    assert not too_small.holds(plan)
    with pytest.raises(ValueError, match=re.escape(f"plan: expected at most {too_small}, got PlanCapacity(")):
        buffers(too_small).load(plan)
