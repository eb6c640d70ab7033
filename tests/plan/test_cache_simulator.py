"""Replays of orders through a cache of KV blocks."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm_operators.plan.cache_simulator import number_blocks, simulate_cache
from batchllm_operators.plan.prefix_order import usable_blocks
from tests.plan.staged_jobs import ideal_computed_tokens
from tests.plan.test_prefix_order import sort_prompts

PROMPTS = st.lists(st.lists(st.integers(0, 1), max_size=8), min_size=1, max_size=14)


def found_blocks(
    prompts: list[list[int]], block_size: int, capacity: int, *, own: list[int] | None = None, running: int = 1
) -> list[int]:
    """Blocks each prompt finds when they are fed in this order."""
    order = sort_prompts(prompts, block_size)
    lengths = np.array([len(prompts[row]) for row in order.rows], dtype=np.int32)
    position = np.argsort(order.rows)
    return simulate_cache(
        position,
        number_blocks(order, lengths // block_size),
        usable_blocks(lengths, block_size),
        capacity_blocks=capacity,
        own_blocks=None if own is None else np.array(own, dtype=np.int32)[order.rows],
        running=running,
    ).tolist()


def found_by_hand(prompts: list[list[int]], block_size: int, capacity: int) -> list[int]:
    """The same, one request at a time, with an ordered dictionary."""
    cache: OrderedDict[tuple[int, ...], None] = OrderedDict()
    found = []
    for prompt in prompts:
        blocks = [tuple(prompt[:end]) for end in range(block_size, len(prompt) + 1, block_size)]
        hits = 0
        while hits < len(blocks) and blocks[hits] in cache:
            hits += 1
        found.append(min(hits, max(len(prompt) - 1, 0) // block_size))
        used = blocks[:hits]
        for block in used:
            del cache[block]
        for block in blocks[hits:]:
            if block in cache:
                del cache[block]
            elif len(cache) + len(used) == capacity:
                if not cache:
                    break
                cache.popitem(last=False)
            used.append(block)
        for block in reversed(used):
            cache[block] = None
    return found


@given(PROMPTS, st.integers(1, 3), st.integers(1, 12))
def test_one_request_at_a_time_is_a_least_recently_used_cache(
    prompts: list[list[int]], block_size: int, capacity: int
) -> None:
    assert found_blocks(prompts, block_size, capacity) == found_by_hand(prompts, block_size, capacity)


@given(PROMPTS, st.integers(1, 3), st.integers(1, 4))
def test_a_cache_that_holds_everything_is_the_ideal_one(
    prompts: list[list[int]], block_size: int, running: int
) -> None:
    found = found_blocks(prompts, block_size, 10_000, own=[2] * len(prompts), running=running)
    computed = sum(len(prompt) - block_size * hit for prompt, hit in zip(prompts, found, strict=True))
    assert computed == ideal_computed_tokens(prompts, block_size)


@given(PROMPTS, st.integers(1, 6), st.integers(1, 5), st.integers(0, 3))
def test_more_requests_at_a_time_and_own_blocks_never_break_the_replay(
    prompts: list[list[int]], capacity: int, running: int, own: int
) -> None:
    found = found_blocks(prompts, 1, capacity, own=[own] * len(prompts), running=running)
    for prompt, hit in zip(prompts, found, strict=True):
        assert 0 <= hit <= max(len(prompt) - 1, 0)


def test_alternating_groups_thrash_a_cache_that_holds_one_of_them() -> None:
    one, other = [1] * 8, [2] * 8
    alternating = [[*(one if turn % 2 == 0 else other), 9, turn] for turn in range(8)]
    together = alternating[::2] + alternating[1::2]
    assert sum(found_blocks(alternating, 2, 5)) == 0
    assert sum(found_blocks(together, 2, 5)) == 6 * 4


def test_what_requests_fill_alone_evicts_shared_blocks() -> None:
    prompts = [[1] * 4 + [5], [2, 2], [1] * 4 + [6]]
    assert found_blocks(prompts, 1, 8) == [0, 0, 4]
    assert found_blocks(prompts, 1, 8, own=[0, 6, 0]) == [0, 0, 0]


@pytest.mark.parametrize(("capacity", "running"), [(0, 1), (1, 0)])
def test_a_cache_without_blocks_or_an_engine_without_requests_is_refused(capacity: int, running: int) -> None:
    with pytest.raises(ValueError, match="expected a cache of 1 block and 1 running request or more"):
        found_blocks([[1]], 1, capacity, running=running)
