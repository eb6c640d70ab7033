"""The plan of a step: every row reads every key of its own exactly once, together with others where that pays."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm_kernels.attention.work_plan import DIRECT, Merge, OwnItem, SharedItem, WorkPlan, WorkPlanShape, plan_work

from .batches import Request, Step, Tensors, mixed_requests, relative_error, tensors
from .plan_batches import batches, shapes

SHAPE = WorkPlanShape(block_size=16, queries_per_kv_head=4, minimum_split_tokens=256)

KeyRange = tuple[int, int]


def shared_parts(plan: WorkPlan) -> list[tuple[int, int, int, KeyRange]]:
    """(token, slot, request whose blocks are read, keys) of every shared item's rows."""
    return [
        (token, slot + split, request, (kv_start, kv_end))
        for row_start, row_count, request, kv_start, kv_end, split in plan.shared_items.tolist()
        for token, slot in plan.shared_rows[row_start : row_start + row_count].tolist()
    ]


def key_ranges(plan: WorkPlan) -> dict[int, list[KeyRange]]:
    """Key ranges that each token reads, in the order of keys."""
    ranges = defaultdict(list)
    for token, _, _, keys in shared_parts(plan):
        ranges[token].append(keys)
    for token, kv_start, kv_end, *_ in plan.own_items.tolist():
        ranges[token].append((kv_start, kv_end))
    return {token: sorted(read) for token, read in ranges.items()}


@settings(max_examples=100, deadline=None)
@given(batches, shapes, st.booleans())
def test_every_row_reads_each_of_its_keys_once(batch: list[Request], shape: WorkPlanShape, share: bool) -> None:
    step = Step(batch, block_size=shape.block_size)
    plan = step.plan(shape, share=share)
    read = key_ranges(plan)
    assert sorted(read) == np.flatnonzero(step.seq_lens).tolist()
    for token, ranges in read.items():
        assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
        assert ranges[-1][1] == step.seq_lens[token]
        assert all(start < end for start, end in ranges)
    for token, _, request, (kv_start, kv_end) in shared_parts(plan):
        blocks = slice(kv_start // step.block_size, kv_end // step.block_size)
        assert step.block_table[token, blocks].tolist() == step.block_table[request, blocks].tolist()
        assert kv_start % step.block_size == kv_end % step.block_size == 0


@settings(max_examples=100, deadline=None)
@given(batches, shapes)
def test_every_partial_result_is_written_once_and_taken_in_once_in_the_order_of_keys(
    batch: list[Request], shape: WorkPlanShape
) -> None:
    plan = Step(batch, block_size=shape.block_size).plan(shape)
    written = {slot: (token, keys) for token, slot, _, keys in shared_parts(plan)}
    assert len(written) == len(shared_parts(plan)) == plan.partials - plan.own_partials
    outputs, merged_to = [], {}
    taken: list[int] = []
    for token, kv_start, kv_end, first, end, out in sorted(plan.own_items.tolist()):
        shared_before = [written[slot] for slot in range(first, end)]
        assert [owner for owner, _ in shared_before] == [token] * (end - first)
        assert [keys for _, keys in shared_before] == sorted(keys for _, keys in shared_before)
        taken += range(first, end)
        if out == DIRECT:
            outputs.append(token)
        else:
            assert out not in written
            assert out < plan.own_partials, "slots of own ranges stand before the shared ones"
            written[out] = token, (kv_start, kv_end)
            merged_to[out] = token
    for token, first, end in plan.merges.tolist():
        assert end - first > 1
        parts = [written[slot] for slot in range(first, end)]
        assert [merged_to.pop(slot) for slot in range(first, end)] == [token] * (end - first)
        assert [keys for _, keys in parts] == sorted(keys for _, keys in parts)
        taken += range(first, end)
        outputs.append(token)
    assert not merged_to
    assert sorted(taken) == sorted(written) == list(range(plan.partials))
    assert sorted(outputs) == [token for token, request in enumerate(batch) if request.own_tokens or request.shares]


@settings(max_examples=100, deadline=None)
@given(batches, shapes)
def test_items_of_a_node_cover_its_rows_and_its_keys(batch: list[Request], shape: WorkPlanShape) -> None:
    plan = Step(batch, block_size=shape.block_size).plan(shape)
    starts = plan.node_row_start.tolist()
    assert (starts[0], starts[-1], len(starts)) == (0, len(plan.shared_rows), len(plan.nodes) + 1)
    of_rows: dict[int, list[KeyRange]] = defaultdict(list)
    for row_start, row_count, request, kv_start, kv_end, _ in plan.shared_items.tolist():
        assert 0 < row_count <= shape.shared_tile_tokens
        node = int(np.searchsorted(starts, row_start, side="right")) - 1
        assert request == plan.nodes[node][0]
        assert row_start + row_count <= starts[node + 1]
        for row in range(row_start, row_start + row_count):
            of_rows[row].append((kv_start, kv_end))
    for node, (_, kv_start, kv_end) in enumerate(plan.nodes.tolist()):
        for row in range(starts[node], starts[node + 1]):
            ranges = sorted(of_rows[row])
            assert [start for start, _ in ranges] == [kv_start, *(end for _, end in ranges[:-1])]
            assert ranges[-1][1] == kv_end
    assert plan.shared_tokens == sum(end - start for _, start, end in plan.nodes.tolist())


@settings(max_examples=60, deadline=None)
@given(batches, shapes, st.randoms(use_true_random=False))
def test_rows_in_another_order_get_the_same_items(batch: list[Request], shape: WorkPlanShape, random: Random) -> None:
    step = Step(batch, block_size=shape.block_size)
    order = list(range(len(batch)))
    random.shuffle(order)
    moved = key_ranges(plan_work(step.block_table[order], step.seq_lens[order], shape))
    assert {order[token]: ranges for token, ranges in moved.items()} == key_ranges(step.plan(shape))


@settings(max_examples=60, deadline=None)
@given(batches, shapes, st.randoms(use_true_random=False))
def test_sharing_splitting_and_order_of_rows_do_not_change_the_result(
    batch: list[Request], shape: WorkPlanShape, random: Random
) -> None:
    step = Step(batch, block_size=shape.block_size)
    numbers = tensors(step, heads=shape.queries_per_kv_head, head_size=8)
    expected = numbers.expected()
    if expected.isnan().all():
        return
    for share in (True, False):
        assert relative_error(numbers.planned(step.plan(shape, share=share)), expected) < 1e-5
    order = list(range(len(batch)))
    random.shuffle(order)
    assert relative_error(_in_order(step, numbers, shape, order), expected) < 1e-5


def _in_order(step: Step, numbers: Tensors, shape: WorkPlanShape, order: list[int]) -> torch.Tensor:
    """The result of the same rows in another order, back in the first."""
    table, lengths = step.block_table[order], step.seq_lens[order]
    moved = replace(
        numbers,
        query=numbers.query[order],
        block_table=torch.from_numpy(table),
        seq_lens=torch.from_numpy(lengths),
    )
    back = torch.empty_like(numbers.query)
    back[order] = moved.planned(plan_work(table, lengths, shape))
    return back


def test_a_shared_prefix_is_read_once_for_a_group() -> None:
    step = Step([Request(own_tokens=200, shares=(("prefix", 125),)) for _ in range(16)])
    plan = step.plan(SHAPE)
    assert plan.shared_tokens == plan.shared_kv_tokens_read == 2000
    assert plan.own_kv_tokens_read == 16 * 200
    alone = step.plan(SHAPE, share=False)
    assert (alone.shared_kv_tokens_read, alone.kv_tokens_read) == (0, 16 * 2200)


def test_a_group_larger_than_a_tile_reads_its_prefix_once_for_each_tile() -> None:
    step = Step([Request(own_tokens=200, shares=(("prefix", 125),)) for _ in range(17)])
    assert step.plan(SHAPE).shared_kv_tokens_read == 2 * 2000
    assert step.plan(replace(SHAPE, shared_tile_rows=128)).shared_kv_tokens_read == 2000
    assert step.plan(SHAPE).shared_tokens == 2000


def test_a_parent_is_read_once_for_all_its_groups() -> None:
    step = Step([Request(own_tokens=20, shares=(("parent", 40), (f"document {n % 4}", 50))) for n in range(16)])
    assert step.plan(SHAPE).kv_tokens_read == 16 * (40 + 4 * 50) + 16 * 20


def test_a_parent_that_is_too_short_to_pay_is_read_with_each_group() -> None:
    step = Step([Request(own_tokens=20, shares=(("parent", 2), (f"document {n % 4}", 50))) for n in range(16)])
    assert step.plan(SHAPE).kv_tokens_read == 16 * 4 * 52 + 16 * 20


def test_a_short_level_between_two_that_pay_is_read_with_the_lower() -> None:
    step = Step(
        [
            Request(own_tokens=20, shares=(("system", 40), (f"template {n % 2}", 1), (f"document {n % 4}", 50)))
            for n in range(16)
        ]
    )
    assert step.plan(SHAPE).kv_tokens_read == 16 * (40 + 4 * 51) + 16 * 20


def test_a_prefix_is_shared_when_it_saves_more_than_one_partial_result_a_row() -> None:
    # two partial results of 4 heads cost as much as 16 KV tokens in 16 bits, 8 in 32
    for blocks, element_bytes, shared in ((1, 2, 0), (2, 2, 32), (1, 4, 16)):
        step = Step([Request(own_tokens=20, shares=(("prefix", blocks),)) for _ in range(2)])
        assert step.plan(replace(SHAPE, element_bytes=element_bytes)).shared_tokens == shared


def test_the_block_of_a_rows_query_token_is_not_shared() -> None:
    rows = Step([Request(own_tokens=0, shares=(("prefix", 6),)) for _ in range(4)])
    assert rows.plan(SHAPE).shared_tokens == 5 * 16
    assert rows.plan(SHAPE).own_kv_tokens_read == 4 * 16


def test_tiles_of_one_query_token_have_nothing_to_share() -> None:
    step = Step([Request(own_tokens=20, shares=(("prefix", 100),)) for _ in range(4)])
    assert step.plan(replace(SHAPE, shared_tile_rows=4)).shared_tokens == 0


def test_shared_items_are_split_to_like_sizes_and_the_longest_come_first() -> None:
    step = Step(
        [Request(own_tokens=20, shares=((f"prefix {n % 2}", blocks),)) for n, blocks in enumerate([500, 305] * 8)]
    )
    items = step.plan(SHAPE).shared_items
    lengths = items[:, SharedItem.KV_END] - items[:, SharedItem.KV_START]
    assert lengths.max() == 272  # about 256: splits are rounded to a number, and raised to whole blocks
    assert (np.diff(lengths) <= 0).all()
    assert len(items) == 30 + 18


def test_tiles_that_read_the_same_keys_stand_together() -> None:
    step = Step([Request(own_tokens=20, shares=(("prefix", 200),)) for _ in range(40)])
    items = step.plan(SHAPE).shared_items
    assert items[:, SharedItem.KV_START].tolist() == sorted(3 * list(range(0, 3200, 256)))


def test_the_own_range_of_a_lone_row_is_split_and_merged() -> None:
    plan = Step([Request(own_tokens=4100)]).plan(replace(SHAPE, minimum_split_tokens=64))
    assert len(plan.own_items) == plan.partials == 16
    assert plan.merges.tolist() == [[0, 0, 16]]


def test_only_the_first_split_of_an_own_range_takes_in_what_is_shared() -> None:
    step = Step([Request(own_tokens=1000, shares=(("prefix", 20),)) for _ in range(3)])
    plan = step.plan(replace(SHAPE, minimum_split_tokens=64))
    assert len(plan.own_items) == 3 * 4
    takes_in = plan.own_items[:, OwnItem.FIRST_SLOT] < plan.own_items[:, OwnItem.END_SLOT]
    assert plan.own_items[takes_in, OwnItem.KV_START].tolist() == [320] * 3
    assert (plan.own_items[~takes_in, OwnItem.KV_START] > 320).all()
    assert plan.merges[:, Merge.TOKEN].tolist() == [0, 1, 2]


def test_own_ranges_of_a_batch_that_fills_the_device_are_not_split() -> None:
    plan = Step([Request(own_tokens=300 + 20 * n) for n in range(70)]).plan(SHAPE)
    assert plan.partials == len(plan.merges) == 0
    assert (plan.own_items[:, OwnItem.OUT_SLOT] == DIRECT).all()
    assert plan.own_items[:, OwnItem.TOKEN].tolist() == list(range(69, -1, -1))  # longest first


def test_a_row_that_all_others_would_wait_for_is_split() -> None:
    plan = Step([Request(own_tokens=100)] * 70 + [Request(own_tokens=20_000)]).plan(SHAPE)
    assert plan.merges[:, Merge.TOKEN].tolist() == [70]
    assert len(plan.own_items) == 70 + 12


def test_padding_rows_get_no_work() -> None:
    plan = Step([Request(own_tokens=30), Request(own_tokens=0), Request(own_tokens=0)]).plan(SHAPE)
    assert plan.own_items[:, OwnItem.TOKEN].tolist() == [0]
    assert plan.query_tokens == 3


@pytest.mark.parametrize("rows", [0, 3])
def test_a_step_without_rows_has_an_empty_plan(rows: int) -> None:
    plan = plan_work(np.zeros((rows, 4), dtype=np.int32), np.zeros(rows, dtype=np.int32), SHAPE)
    assert [len(plan.shared_items), len(plan.own_items), len(plan.merges), len(plan.nodes)] == [0, 0, 0, 0]
    assert plan.node_row_start.tolist() == [0]
    assert (plan.partials, plan.query_tokens) == (0, rows)


def test_the_same_step_gives_the_same_bytes() -> None:
    step = Step(mixed_requests())
    first, second = step.plan(SHAPE), step.plan(SHAPE)
    for name in ("shared_items", "shared_rows", "own_items", "merges", "nodes", "node_row_start"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()
        assert getattr(first, name).dtype == np.int32


@pytest.mark.parametrize(
    ("table", "lengths", "message"),
    [
        ([[1, 2]], [20, 20], "block_table: expected [2, max_blocks], got [1, 2]"),
        ([[1, 2]], [[20]], "seq_lens: expected [rows], got [1, 1]"),
        ([[1, 2]], [-1], "seq_lens: expected 0 or more tokens, got -1"),
        ([[1, 2]], [33], "seq_lens: expected at most 2 blocks of 16 tokens, got 33"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(table: list[list[int]], lengths: list[int], message: str) -> None:
    arrays = (np.array(numbers, dtype=np.int32) for numbers in (table, lengths))
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_work(*arrays, SHAPE)


def test_tiles_without_room_for_the_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="shared_tile_rows: expected at least the 96 heads of a KV head, got 64"):
        WorkPlanShape(block_size=16, queries_per_kv_head=96)
    with pytest.raises(ValueError, match="block_size: expected a positive number, got 0"):
        WorkPlanShape(block_size=0, queries_per_kv_head=1)
