"""The order in which an engine takes the requests."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm_operators.plan.first_level import FirstLevel, choose_first_level
from batchllm_operators.plan.order import EngineOrder, SortedRequests, order_by_ratio
from batchllm_operators.plan.prefix_order import PrefixOrder
from tests.plan.staged_jobs import ideal_computed_tokens
from tests.plan.test_first_level import forest_of

PROMPTS = st.lists(st.lists(st.integers(0, 1), max_size=9), max_size=12, unique_by=tuple)
POLICIES = ["decode_first", "blend"]


def ordered(
    prompts: list[list[int]], outputs: list[int], *, block_size: int = 2, policy: str = "decode_first"
) -> tuple[list[int], EngineOrder, PrefixOrder, FirstLevel]:
    """Rows in engine order; a token of output costs as much as one of the prompt."""
    order, forest, whole = forest_of(prompts, block_size)
    first_level = choose_first_level(forest, whole)
    output_tokens = np.array([outputs[row] for row in order.rows], dtype=np.int32)
    requests = SortedRequests(
        np.array([len(prompts[row]) for row in order.rows], dtype=np.int32),
        order.shared_blocks * np.int64(block_size),
        output_tokens,
        output_tokens.astype(np.float64),
        whole,
    )
    engine = order_by_ratio(forest, first_level, requests, block_size=block_size, prefill_per_token=1.0, policy=policy)  # type: ignore[arg-type]
    return order.rows[engine.positions].tolist(), engine, order, first_level


@pytest.mark.parametrize("policy", POLICIES)
@given(prompts=PROMPTS, data=st.data())
def test_any_policy_reaches_the_optimum_and_knows_what_neighbours_share(
    policy: str, prompts: list[list[int]], data: st.DataObject
) -> None:
    outputs = data.draw(st.lists(st.integers(1, 50), min_size=len(prompts), max_size=len(prompts)))
    rows, engine, order, _ = ordered(prompts, outputs, policy=policy)
    assert sorted(rows) == list(range(len(prompts)))
    as_sorted = [prompts[row] for row in order.rows]
    in_order = [prompts[row] for row in rows]
    assert ideal_computed_tokens(in_order, 2) == ideal_computed_tokens(as_sorted, 2)
    found = [min(blocks, max(len(p) - 1, 0) // 2) for blocks, p in zip(engine.shared_blocks, in_order, strict=True)]
    assert sum(len(p) - 2 * hit for p, hit in zip(in_order, found, strict=True)) == ideal_computed_tokens(in_order, 2)


def test_groups_with_more_decode_for_their_prefill_come_first_and_long_outputs_first_inside() -> None:
    short = [[1] * 20 + [number] for number in range(3)]
    long = [[2] * 20 + [number] for number in range(3)]
    rows, *_ = ordered(short + long, [1, 3, 2, 100, 300, 200])
    assert rows == [4, 5, 3, 1, 2, 0]


def test_a_request_alone_stands_by_its_ratio_among_the_groups() -> None:
    group = [[1] * 20 + [number] for number in range(3)]
    rows, *_ = ordered([*group, [9] * 10, [8] * 10], [20, 20, 20, 500, 1])
    assert (rows[0], rows[-1]) == (3, 4)


def test_the_last_of_all_is_what_ends_soonest() -> None:
    many = [[number] * 20 for number in range(100)]
    # By its ratio the longer completion would stand last.
    rows, *_ = ordered([*many, [200] * 400, [201] * 50], [100] * 100 + [30, 5])
    assert rows[-2:] == [100, 101]


def test_a_request_that_is_only_the_prefix_leads_its_group() -> None:
    rows, *_ = ordered([[1] * 8 + [5], [1] * 8, [1] * 8 + [6]], [50, 1, 60])
    assert rows[0] == 1


def test_blend_keeps_the_ratio_of_what_is_taken_near_that_of_all() -> None:
    prompts = [[number] * 20 + [member] for number in range(40) for member in range(2)]
    outputs = [100] * 40 + [1] * 40
    blended, *_ = ordered(prompts, outputs, policy="blend")
    sorted_first, *_ = ordered(prompts, outputs)
    share = [outputs[row] for row in blended]
    assert sum(output == 100 for output in share[:40]) in range(18, 23)
    assert [outputs[row] for row in sorted_first] == [100] * 40 + [1] * 40


def test_singles_that_begin_together_do_not_end_together() -> None:
    outputs = [10 * (12 - row) for row in range(12)]
    rows, *_ = ordered([[row] * 20 for row in range(12)], outputs)
    assert rows == [0, 3, 6, 1, 4, 7, 2, 5, 8, 9, 10, 11]


def test_groups_of_one_parent_stay_together_when_their_parent_is_worth_it() -> None:
    prompts = [
        [tree] * 100 + [10 + group] * 50 + [member] for tree in (1, 2) for group in (1, 2) for member in range(3)
    ]
    outputs = [500 if group == 1 else 1 for _ in (1, 2) for group in (1, 2) for _ in range(3)]
    rows, engine, *_ = ordered(prompts, outputs)
    assert engine.parted_trees == 0
    assert [prompts[row][0] for row in rows] in ([1] * 6 + [2] * 6, [2] * 6 + [1] * 6)


def test_a_short_common_beginning_gives_way_to_a_reorder_that_is_worth_more() -> None:
    def group(tree: int, number: int, output: int) -> tuple[list[list[int]], list[int]]:
        return [[tree] * 2 + [number] * 4_000 + [member] for member in range(2)], [output] * 2

    prompts, outputs = [], []
    for tree in (1, 2):
        for number in (1, 2):
            some, lengths = group(tree, 10 * tree + number, 9_000 if number == 1 else 1)
            prompts += some
            outputs += lengths
    rows, engine, *_ = ordered(prompts, outputs)
    assert engine.parted_trees == 2
    assert [outputs[row] for row in rows] == [9_000] * 4 + [1] * 4
