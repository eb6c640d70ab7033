"""Sharing is found from the block table alone."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm_kernels.attention.prefix_sharing import SharedPrefixes, find_shared_prefixes

from .batches import Request, Step

Node = tuple[int, int, frozenset[int]]


def nodes(found: SharedPrefixes) -> list[Node]:
    bounds = found.member_start
    return [
        (
            int(found.first_block[n]),
            int(found.end_block[n]),
            frozenset(found.members[bounds[n] : bounds[n + 1]].tolist()),
        )
        for n in range(len(found.parent))
    ]


def test_requests_with_equal_leading_blocks_are_found_in_any_order_of_requests() -> None:
    table = np.array([[7, 8, 1, 2], [5, 3, 4, 9], [7, 8, 6, 0], [5, 3, 4, 10]], dtype=np.int32)
    found = find_shared_prefixes(table, np.full(4, 4))
    assert set(nodes(found)) == {(0, 2, frozenset({0, 2})), (0, 3, frozenset({1, 3}))}
    assert found.parent.tolist() == [-1, -1]


def test_a_group_inside_a_group_starts_where_its_parent_ends() -> None:
    table = np.array([[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 3, 7], [1, 2, 8, 9]], dtype=np.int32)
    found = find_shared_prefixes(table, np.full(4, 4))
    assert nodes(found) == [(0, 2, frozenset({0, 1, 2, 3})), (2, 3, frozenset({0, 2}))]
    assert found.parent.tolist() == [-1, 0]


def test_blocks_that_were_not_full_before_the_step_are_not_shared() -> None:
    table = np.array([[1, 2, 3], [1, 2, 3]], dtype=np.int32)
    assert nodes(find_shared_prefixes(table, np.array([3, 2]))) == [(0, 2, frozenset({0, 1}))]
    assert nodes(find_shared_prefixes(table, np.array([3, 0]))) == []


def test_equal_blocks_behind_different_ones_are_not_a_shared_prefix() -> None:
    table = np.array([[1, 2, 3, 4], [1, 9, 3, 4]], dtype=np.int32)
    assert nodes(find_shared_prefixes(table, np.full(2, 4))) == [(0, 1, frozenset({0, 1}))]


def test_levels_beyond_the_limit_are_left_out() -> None:
    table = np.array([[1, 2, 3], [1, 2, 4], [1, 5, 6]], dtype=np.int32)
    assert len(nodes(find_shared_prefixes(table, np.full(3, 3), max_levels=1))) == 1


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=5, max_size=5), st.integers(0, 5)), min_size=1, max_size=9)
)
def test_nodes_are_those_of_the_compressed_trie(rows: list[tuple[list[int], int]]) -> None:
    table = np.array([row for row, _ in rows], dtype=np.int32)
    prefixes = [tuple(row[:full]) for row, full in rows]
    shared = {
        tuple(a[:depth]) for a, b in combinations(prefixes, 2) if (depth := _common(a, b)) > 0
    }  # the longest common prefixes of pairs are the nodes of the trie
    expected = {
        (len(prefix), frozenset(i for i, p in enumerate(prefixes) if p[: len(prefix)] == prefix)) for prefix in shared
    }
    found = find_shared_prefixes(table, np.array([full for _, full in rows]), max_levels=9)
    assert {(end, members) for _, end, members in nodes(found)} == expected
    for node, parent in enumerate(found.parent):
        assert found.first_block[node] == (found.end_block[parent] if parent >= 0 else 0)


class CountingTable(np.ndarray):
    """A block table that counts the entries which are read from it."""

    entries_read = 0

    def __getitem__(self, key: Any) -> Any:
        part = np.asarray(super().__getitem__(key))
        self.entries_read += part.size
        return part


@pytest.mark.parametrize("prefixes", [(), ((1, 200),), ((64, 125),), ((1, 12), (64, 100)), ((1, 40), (512, 100))])
def test_the_block_table_is_read_about_once_however_requests_share(prefixes: tuple[tuple[int, int], ...]) -> None:
    own = 256 - sum(blocks for _, blocks in prefixes)
    step = Step(
        [
            Request(own_tokens=16 * own, shares=tuple((f"{n % groups}", blocks) for groups, blocks in prefixes))
            for n in range(1024)
        ]
    )
    table = step.block_table.view(CountingTable)
    found = find_shared_prefixes(table, np.full(1024, 255))
    assert len(found.parent) == sum(groups for groups, _ in prefixes)
    assert 0 < table.entries_read < 1.1 * table.size


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
