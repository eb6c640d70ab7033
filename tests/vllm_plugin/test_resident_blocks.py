"""The radix tree of held blocks against sets of prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm_kernels.vllm_plugin.resident_blocks import ResidentBlocks

Block = tuple[int, ...]
"""All there is before and in it, as a chained hash stands for."""


def chain(contents: Sequence[int]) -> list[Block]:
    return [tuple(contents[: end + 1]) for end in range(len(contents))]


contents = st.lists(st.integers(0, 1), max_size=7)
names = st.sampled_from("abcdef")
holdings = st.lists(st.tuples(names, st.none() | contents), max_size=20)
"""Holder, and what it holds from now on; None: it drops."""


def after(
    moves: list[tuple[str, list[int] | None]], as_chain: Any = list
) -> tuple[ResidentBlocks, dict[str, set[Block]]]:
    tree, held = ResidentBlocks(), dict[str, set[Block]]()
    for name, now in moves:
        if now is None:
            tree.drop(name)
            held.pop(name, None)
        else:
            tree.hold(name, as_chain(chain(now)))
            held[name] = set(chain(now))
    return tree, held


@pytest.mark.parametrize("as_chain", [list, tuple])
@given(moves=holdings, asked=contents)
def test_missing_blocks_are_those_that_nobody_holds(as_chain: Any, moves: Any, asked: list[int]) -> None:
    tree, held = after(moves, as_chain)
    assert tree.missing(as_chain(chain(asked))) == len(set(chain(asked)) - set().union(*held.values()))


@given(moves=holdings)
def test_exclusive_blocks_are_those_of_one_holder_alone(moves: Any) -> None:
    tree, held = after(moves)
    for name, blocks in held.items():
        others = set().union(*(theirs for other, theirs in held.items() if other != name))
        assert tree.exclusive(name) == len(blocks - others)


def until(tree: ResidentBlocks, ends: dict[str, int]) -> tuple[Any, Any]:
    runs = np.array([tree.run_of(name) for name in ends], dtype=np.int64)
    return tree.until(runs, np.array(list(ends.values()), dtype=np.int64))


@given(moves=holdings, ends=st.fixed_dictionaries({name: st.integers(0, 9) for name in "abcdef"}))
def test_a_block_stays_until_its_last_holder_lets_go(moves: Any, ends: dict[str, int]) -> None:
    tree, held = after(moves)
    run_blocks, run_last = until(tree, {name: ends[name] for name in held})
    every = set().union(*held.values())
    assert run_blocks.sum() == len(every)
    for step in range(-1, 10):
        staying = {block for name, blocks in held.items() if ends[name] >= step for block in blocks}
        assert run_blocks[run_last >= step].sum() == len(staying)


@given(moves=holdings)
def test_holders_are_known_until_they_drop(moves: Any) -> None:
    tree, held = after(moves)
    assert {name for name in "abcdef" if name in tree} == set(held)


@given(moves=holdings)
def test_the_run_of_a_holder_keeps_its_number_until_it_drops(moves: Any) -> None:
    tree, numbers = ResidentBlocks(), dict[str, int]()
    for name, now in moves:
        if now is None:
            tree.drop(name)
            numbers.pop(name, None)
        else:
            numbers[name] = tree.hold(name, chain(now))
        assert {name: tree.run_of(name) for name in numbers} == numbers


@given(moves=holdings)
def test_there_are_at_most_two_runs_for_each_holder(moves: Any) -> None:
    tree, _ = after(moves)
    run_blocks, _ = until(tree, {})
    assert len(run_blocks) <= 1 + 2 * 6, "expected numbers to be used again"


@given(moves=holdings)
def test_nothing_is_left_when_all_have_dropped(moves: Any) -> None:
    tree, held = after(moves)
    for name in held:
        tree.drop(name)
    run_blocks, _ = until(tree, {})
    assert run_blocks.sum() == tree.blocks == 0


def test_hundreds_of_chains_are_told_apart() -> None:
    tree = ResidentBlocks()
    for index in range(300):
        tree.hold(f"{index}", chain([0, 0, index // 10, 0, index]))
    run_blocks, run_last = until(tree, {f"{index}": index + 1 for index in range(300)})
    assert run_blocks.sum() == tree.blocks == 2 + 2 * 30 + 300
    assert run_blocks[run_last >= 291].sum() == 2 + 2 + 10
