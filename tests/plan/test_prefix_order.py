"""Block hashes and the order in which every shared prefix is one range."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm_operators.plan.block_hashes import BlockHashes, hash_blocks
from batchllm_operators.plan.prefix_order import PrefixOrder, hit_blocks, sort_by_prefix

PROMPTS = st.lists(st.lists(st.integers(0, 1), max_size=9), max_size=14)
"""So few different tokens that beginnings are shared."""


def hashes_of(prompts: list[list[int]], block_size: int) -> BlockHashes:
    offsets = np.cumsum([0, *map(len, prompts)]).astype(np.int64)
    tokens = np.array([token for prompt in prompts for token in prompt], dtype=np.int32)
    return hash_blocks(tokens, offsets, block_size)


def keys_of(count: int) -> np.ndarray:
    return np.stack([np.arange(count), np.arange(count)], axis=1).astype(np.uint64)


def sort_prompts(prompts: list[list[int]], block_size: int) -> PrefixOrder:
    return sort_by_prefix(hashes_of(prompts, block_size), keys_of(len(prompts)))


def shared_blocks(one: list[int], other: list[int], block_size: int) -> int:
    count = 0
    while True:
        end = (count + 1) * block_size
        if end > min(len(one), len(other)) or one[:end] != other[:end]:
            return count
        count += 1


@given(PROMPTS, st.integers(1, 4))
def test_neighbours_share_what_their_prompts_share_and_no_prefix_is_torn_apart(
    prompts: list[list[int]], block_size: int
) -> None:
    order = sort_prompts(prompts, block_size)
    ordered = [prompts[row] for row in order.rows]
    assert sorted(order.rows) == list(range(len(prompts)))
    assert (
        order.shared_blocks.tolist()
        == [0, *(shared_blocks(*pair, block_size) for pair in pairwise(ordered))][: len(prompts)]
    )
    for depth in range(1, 10):
        beginnings = [tuple(prompt[: depth * block_size]) for prompt in ordered if len(prompt) >= depth * block_size]
        runs = [one for one, before in zip(beginnings, [None, *beginnings], strict=False) if one != before]
        assert len(runs) == len(set(beginnings))


@given(PROMPTS, st.integers(1, 4), st.randoms())
def test_the_order_does_not_depend_on_the_order_of_the_rows(
    prompts: list[list[int]], block_size: int, chance: random.Random
) -> None:
    keys = keys_of(len(prompts))
    shuffled = list(range(len(prompts)))
    chance.shuffle(shuffled)
    order = sort_by_prefix(hashes_of(prompts, block_size), keys)
    again = sort_by_prefix(hashes_of([prompts[row] for row in shuffled], block_size), keys[shuffled])
    assert [shuffled[row] for row in again.rows] == order.rows.tolist()


@given(PROMPTS, st.integers(1, 400))
def test_hashes_read_a_few_levels_at_a_time_give_the_same_order(prompts: list[list[int]], window_bytes: int) -> None:
    hashes, keys = hashes_of(prompts, 1), keys_of(len(prompts))
    whole, windowed = sort_by_prefix(hashes, keys), sort_by_prefix(hashes, keys, window_bytes=window_bytes)
    assert whole.rows.tolist() == windowed.rows.tolist()
    assert whole.shared_blocks.tolist() == windowed.shared_blocks.tolist()


@given(PROMPTS, st.data())
def test_an_order_with_some_left_out_is_the_order_of_the_others(prompts: list[list[int]], data: st.DataObject) -> None:
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(prompts), max_size=len(prompts))), dtype=np.bool_)
    hashes, keys = hashes_of(prompts, 2), keys_of(len(prompts))
    left = sort_by_prefix(hashes, keys).only(kept)
    rows = np.flatnonzero(kept)
    direct = sort_by_prefix(hashes.of(rows), keys[rows])
    assert left.rows.tolist() == rows[direct.rows].tolist()
    assert left.shared_blocks.tolist() == direct.shared_blocks.tolist()


@settings(max_examples=20)
@given(st.integers(30, 120), st.integers(0, 5))
def test_large_ranges_are_sorted_as_small_ones_are(count: int, seed: int) -> None:
    chance = random.Random(seed)
    prompts = [[chance.randrange(3) for _ in range(chance.randrange(8))] for _ in range(count)]
    order = sort_prompts(prompts, 1)
    ordered = [prompts[row] for row in order.rows]
    assert order.shared_blocks.tolist() == [0, *(shared_blocks(*pair, 1) for pair in pairwise(ordered))]


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 32])
def test_a_block_hash_covers_everything_before_it(block_size: int) -> None:
    chance = random.Random(block_size)
    prompt = [chance.randrange(100_000) for _ in range(block_size * 3)]
    for place in range(len(prompt)):
        changed = prompt.copy()
        changed[place] += 1
        hashes = hashes_of([prompt, changed], block_size)
        equal = (hashes.lanes[:3] == hashes.lanes[3:]).all(axis=1)
        assert equal.tolist() == [block < place // block_size for block in range(3)]


def test_negative_token_ids_and_the_largest_ones_are_hashed_too() -> None:
    hashes = hashes_of([[-1, 2**31 - 1], [-1, 2**31 - 1], [2**31 - 1, -1]], 1)
    assert (hashes.lanes[:2] == hashes.lanes[2:4]).all()
    assert not (hashes.lanes[:2] == hashes.lanes[4:]).any()


def test_the_last_token_of_a_prompt_is_never_taken_from_the_cache() -> None:
    lengths = np.array([0, 1, 31, 32, 33, 64, 65], dtype=np.int32)
    assert hit_blocks(np.full(7, 9, dtype=np.int32), lengths, 32).tolist() == [0, 0, 0, 0, 1, 1, 2]
