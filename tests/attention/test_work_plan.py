"""The plan of a step: every query token reads every key it sees exactly once."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm_kernels.attention.plan_buffers import PlanBuffers, PlanCapacity
from batchllm_kernels.attention.work_plan import DIRECT, KV_END, KV_START, PlanShape, WorkPlan, plan_work

from .batches import Request, Step, Tensors, mixed_requests, relative_error, tensors

SHAPE = PlanShape(block_size=16, queries_per_kv_head=4)


def keys_read(step: Step, plan: WorkPlan) -> dict[int, list[tuple[int, int]]]:
    """(block, position) of every key that each query token reads."""
    read: dict[int, list[tuple[int, int]]] = {token: [] for token in range(step.query_tokens)}
    for row_start, row_count, request, kv_start, kv_end, _, causal, _ in plan.items.tolist():
        for token in plan.rows[row_start : row_start + row_count, 0].tolist():
            position = int(step.seq_lens[request]) - int(step.query_start_loc[request + 1]) + token
            end = min(kv_end, position + 1) if causal else kv_end
            read[token] += [(int(step.block_table[request, p // step.block_size]), p) for p in range(kv_start, end)]
    return read


def keys_seen(step: Step) -> dict[int, list[tuple[int, int]]]:
    seen = {}
    for request, length in enumerate(step.seq_lens.tolist()):
        first, end = step.query_start_loc[request : request + 2].tolist()
        for token in range(first, end):
            position = length - end + token
            seen[token] = [(int(step.block_table[request, p // step.block_size]), p) for p in range(position + 1)]
    return seen


in_their_own_tokens = st.builds(
    Request,
    own_tokens=st.integers(21, 60),
    query_tokens=st.one_of(st.just(1), st.integers(0, 21)),
    shares=st.sampled_from(
        [(), (("a", 2),), (("a", 2), ("b", 30)), (("a", 2), ("c", 9)), (("d", 12),), (("d", 12), ("e", 1), ("f", 7))]
    ),
)
computing_a_prefix_that_others_share = st.builds(
    Request, own_tokens=st.just(3), query_tokens=st.integers(4, 150), shares=st.just((("d", 12),))
)
requests = st.one_of(in_their_own_tokens, computing_a_prefix_that_others_share)
shapes = st.builds(
    PlanShape,
    block_size=st.sampled_from([16, 32]),
    queries_per_kv_head=st.sampled_from([1, 3, 4, 8]),
    wide_tile_rows=st.sampled_from([16, 64]),
    target_items=st.sampled_from([1, 4, 64]),
    minimum_split_tokens=st.sampled_from([16, 256]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, min_size=1, max_size=8), shapes, st.booleans())
def test_every_token_reads_every_key_it_sees_once(batch: list[Request], shape: PlanShape, share: bool) -> None:
    step = Step(batch, block_size=shape.block_size)
    plan = step.plan(shape, share=share)
    assert {token: sorted(read) for token, read in keys_read(step, plan).items()} == {
        token: sorted(seen) for token, seen in keys_seen(step).items()
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, min_size=1, max_size=8), shapes)
def test_partial_slots_are_filled_once_and_those_of_a_token_stand_together(
    batch: list[Request], shape: PlanShape
) -> None:
    step = Step(batch, block_size=shape.block_size)
    plan = step.plan(shape)
    filled: dict[int, int] = {}
    written = []
    for row_start, row_count, _, _, _, split, _, _ in plan.items.tolist():
        for token, slot in plan.rows[row_start : row_start + row_count].tolist():
            if slot == DIRECT:
                written.append(token)
                continue
            assert slot + split not in filled
            filled[slot + split] = token
    for token, first, end in plan.merges.tolist():
        assert end - first > 1
        assert [filled.pop(slot) for slot in range(first, end)] == [token] * (end - first)
        written.append(token)
    assert not filled
    assert sorted(written) == list(range(step.query_tokens))


@settings(max_examples=40, deadline=None)
@given(st.lists(requests, min_size=1, max_size=6), shapes, st.randoms(use_true_random=False))
def test_sharing_splitting_and_order_of_requests_do_not_change_the_result(
    batch: list[Request], shape: PlanShape, random: Random
) -> None:
    step = Step(batch, block_size=shape.block_size)
    numbers = tensors(step, heads=shape.queries_per_kv_head, head_size=8)
    if not step.query_tokens:
        return
    expected = numbers.expected()
    for share in (True, False):
        assert relative_error(numbers.attend(step.plan(shape, share=share), "reference"), expected) < 1e-5
    order = list(range(len(batch)))
    random.shuffle(order)
    assert relative_error(_in_order(step, numbers, shape, order), expected) < 1e-5


def _in_order(step: Step, numbers: Tensors, shape: PlanShape, order: list[int]) -> torch.Tensor:
    """The result of the same requests in another order, back in the first."""
    starts = step.query_start_loc
    tokens = torch.tensor([t for r in order for t in range(starts[r], starts[r + 1])], dtype=torch.long)
    start_loc = np.cumsum([0] + [starts[r + 1] - starts[r] for r in order], dtype=np.int32)
    moved = replace(
        numbers,
        query=numbers.query[tokens],
        block_table=torch.from_numpy(step.block_table[order]),
        seq_lens=torch.from_numpy(step.seq_lens[order]),
        query_start_loc=torch.from_numpy(start_loc),
    )
    plan = plan_work(step.block_table[order], step.seq_lens[order], start_loc, shape)
    back = torch.empty_like(numbers.query)
    back[tokens] = moved.attend(plan, "reference")
    return back


def test_a_shared_prefix_is_read_once_for_a_group() -> None:
    step = Step([Request(own_tokens=200, shares=(("prefix", 125),)) for _ in range(16)])
    plan = step.plan(SHAPE)
    assert plan.shared_tokens == 2000
    assert plan.kv_tokens_read == 2000 + 16 * 200
    assert step.plan(SHAPE, share=False).kv_tokens_read == 16 * 2200


def test_a_parent_is_read_once_for_all_its_groups() -> None:
    step = Step([Request(own_tokens=20, shares=(("parent", 40), (f"document {n % 4}", 50))) for n in range(16)])
    assert step.plan(SHAPE).kv_tokens_read == 16 * (40 + 4 * 50) + 16 * 20


def test_a_parent_that_is_too_short_to_pay_is_read_with_each_group() -> None:
    step = Step([Request(own_tokens=20, shares=(("parent", 3), (f"document {n % 4}", 50))) for n in range(16)])
    assert step.plan(SHAPE).kv_tokens_read == 16 * 4 * 53 + 16 * 20


def test_a_short_level_between_two_that_pay_is_read_with_the_lower() -> None:
    step = Step(
        [
            Request(own_tokens=20, shares=(("system", 40), (f"template {n % 2}", 1), (f"document {n % 4}", 50)))
            for n in range(16)
        ]
    )
    assert step.plan(SHAPE).kv_tokens_read == 16 * (40 + 4 * 51) + 16 * 20


def test_a_prefix_too_short_to_pay_is_not_shared() -> None:
    step = Step([Request(own_tokens=20, shares=(("prefix", 2),)) for _ in range(2)])
    assert step.plan(SHAPE).shared_tokens == 0


def test_prefill_chunks_that_fill_tiles_alone_are_not_shared() -> None:
    step = Step([Request(own_tokens=160, query_tokens=160, shares=(("prefix", 60),)) for _ in range(4)])
    assert step.plan(SHAPE).shared_tokens == 0


def test_short_prefill_chunks_share_their_context() -> None:
    step = Step([Request(own_tokens=5, query_tokens=5, shares=(("prefix", 60),)) for _ in range(4)])
    assert step.plan(SHAPE).shared_tokens == 960


def test_long_items_are_split_to_like_sizes_and_the_longest_come_first() -> None:
    step = Step([Request(own_tokens=20, shares=(("prefix", 500),)) for _ in range(8)])
    lengths = np.diff(step.plan(SHAPE).items[:, [KV_START, KV_END]])[:, 0]
    assert lengths.max() == 256  # 8 query tokens, whose partial results cost as much as 64 KV tokens
    assert (np.diff(lengths) <= 0).all()


def test_a_batch_that_fills_the_device_is_not_split() -> None:
    step = Step([Request(own_tokens=600) for _ in range(70)])
    plan = step.plan(SHAPE)
    assert plan.partials == 0
    assert len(plan.items) == 70


def test_padding_requests_get_no_work() -> None:
    step = Step([Request(own_tokens=30), Request(own_tokens=1, query_tokens=0), Request(own_tokens=1, query_tokens=0)])
    step.seq_lens[1:] = 10_000  # left over from an earlier step
    assert len(step.plan(SHAPE).items) == 1
    empty = np.zeros((0, 4), dtype=np.int32), np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int32)
    assert len(plan_work(*empty, SHAPE).items) == 0


def test_the_same_step_gives_the_same_bytes() -> None:
    step = Step(mixed_requests())
    first, second = step.plan(SHAPE), step.plan(SHAPE)
    for name in ("items", "rows", "merges"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()


decoding = st.builds(
    Request,
    own_tokens=st.integers(1, 400),
    shares=st.sampled_from([(), (("a", 40),), (("a", 40), ("b", 60)), (("c", 200),)]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(decoding, min_size=1, max_size=12), st.sampled_from([1, 8, 64]))
def test_plans_of_decode_steps_within_the_limits_fit_the_capacity(batch: list[Request], target_items: int) -> None:
    step = Step(batch)
    shape = PlanShape(block_size=16, queries_per_kv_head=4, target_items=target_items)
    assert PlanCapacity.of_steps(len(batch), len(batch), shape).holds(step.plan(shape))


def test_buffers_keep_their_addresses_and_refuse_a_plan_that_does_not_fit() -> None:
    small, large = Step([Request(own_tokens=40)]).plan(SHAPE), Step([Request(own_tokens=40)] * 3).plan(SHAPE)
    buffers = PlanBuffers(PlanCapacity(2, 2, 2, 4), heads=4, head_size=64, device=torch.device("cpu"), fixed_grid=True)
    address = buffers.items.data_ptr()
    buffers.load(small)
    assert buffers.items.data_ptr() == address
    assert buffers.counts.tolist() == [1, 0]
    assert buffers.grid == (2, 2)
    with pytest.raises(ValueError, match=r"plan: expected at most PlanCapacity\(items=2.*got PlanCapacity\(items=3"):
        buffers.load(large)


@pytest.mark.parametrize(
    ("table", "lengths", "starts", "message"),
    [
        ([[1, 2]], [20, 20], [0, 1, 2], "block_table: expected [2, max_blocks], got [1, 2]"),
        ([[1, 2]], [20], [0, 1, 2], "query_start_loc: expected [2], got [3]"),
        ([[1, 2]], [20], [1, 2], "query_start_loc: expected to start at 0"),
        ([[1, 2]], [3], [0, 5], "seq_lens: expected at least the 5 query tokens of request 0, got 3"),
        ([[1, 2]], [33], [0, 1], "seq_lens: expected at most 2 blocks of 16 tokens, got 33"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    table: list[list[int]], lengths: list[int], starts: list[int], message: str
) -> None:
    arrays = (np.array(numbers, dtype=np.int32) for numbers in (table, lengths, starts))
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_work(*arrays, SHAPE)


def test_tiles_without_room_for_the_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="tile rows: expected 32 heads per KV head"):
        PlanShape(block_size=16, queries_per_kv_head=32)
    with pytest.raises(ValueError, match="block_size: expected a positive number, got 0"):
        PlanShape(block_size=0, queries_per_kv_head=1)
