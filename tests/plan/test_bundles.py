"""Packing the engine order into bundles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm_operators.plan.bundles import cut, pack_bundles

REQUESTS = st.lists(st.tuples(st.floats(0.01, 10), st.integers(0, 20), st.booleans()), min_size=1, max_size=60)
"""Seconds, blocks shared with the request before, whether a tree begins."""


def columns(requests: list[tuple[float, int, bool]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    seconds = np.array([one for one, _, _ in requests])
    tree = np.cumsum([new for _, _, new in requests]).astype(np.int32)
    shared = np.array([0 if new else blocks for _, blocks, new in requests], dtype=np.int32)
    shared[0] = 0
    return seconds, shared, tree


@given(REQUESTS, st.integers(1, 5), st.floats(0.5, 100))
def test_every_request_is_in_one_bundle_in_the_order_of_its_worker(
    requests: list[tuple[float, int, bool]], engines: int, bound: float
) -> None:
    seconds, shared, tree = columns(requests)
    bundles = pack_bundles(seconds, shared, tree, engines=engines, bundle_seconds=bound)
    assert sorted(bundles.places) == list(range(len(requests)))
    pieces = np.split(bundles.places, bundles.offsets[1:-1])
    assert all(len(piece) for piece in pieces)
    for engine in range(engines):
        mine = [piece for piece, owner in zip(pieces, bundles.engine, strict=True) if owner == engine]
        if mine:
            assert (np.diff(np.concatenate(mine)) > 0).all()
    for piece in pieces:
        assert len(piece) == 1 or seconds[piece].sum() <= bound + seconds[piece].max() + 1e-9


@given(REQUESTS, st.integers(1, 5))
def test_what_a_request_shares_counts_only_on_its_worker(requests: list[tuple[float, int, bool]], engines: int) -> None:
    seconds, shared, tree = columns(requests)
    bundles = pack_bundles(seconds, shared, tree, engines=engines, bundle_seconds=1e9)
    for number, piece in enumerate(np.split(bundles.places, bundles.offsets[1:-1])):
        begin = bundles.offsets[number]
        for place in range(1, len(piece)):
            between = shared[piece[place - 1] + 1 : piece[place] + 1]
            assert bundles.shared_blocks[begin + place] == between.min()
        assert bundles.shared_blocks[begin] == 0


@pytest.mark.parametrize("engines", [2, 3, 8])
def test_many_like_trees_end_together_uncut(engines: int) -> None:
    tree = np.repeat(np.arange(96), 5).astype(np.int32)
    shared = np.where(np.arange(480) % 5 == 0, 0, 9).astype(np.int32)
    seconds = np.full(480, 0.1)
    bundles = pack_bundles(seconds, shared, tree, engines=engines, bundle_seconds=1e9)
    load = np.bincount(bundles.engine, weights=np.add.reduceat(seconds[bundles.places], bundles.offsets[:-1]))
    assert load.max() == pytest.approx(load.min())
    assert bundles.shared_blocks.sum() == shared.sum()


def test_a_tree_above_a_fair_share_is_cut_where_least_is_shared() -> None:
    shared = np.full(100, 50, dtype=np.int32)
    shared[0] = 0
    shared[47] = 3
    bundles = pack_bundles(np.ones(100), shared, np.zeros(100, np.int32), engines=2, bundle_seconds=1e9)
    assert sorted(np.diff(bundles.offsets).tolist()) == [47, 53]
    assert shared.sum() - bundles.shared_blocks.sum() == 3


def test_two_equal_trees_on_three_workers_are_cut_into_fair_shares() -> None:
    tree = np.repeat([0, 1], 300).astype(np.int32)
    shared = np.where(np.isin(np.arange(600), [0, 300]), 0, 9).astype(np.int32)
    bundles = pack_bundles(np.ones(600), shared, tree, engines=3, bundle_seconds=1e9)
    assert np.bincount(bundles.engine, weights=np.diff(bundles.offsets)).max() < 220


def test_bundles_of_several_workers_are_dispatched_side_by_side() -> None:
    tree = np.arange(200, dtype=np.int32)
    bundles = pack_bundles(np.ones(200), np.zeros(200, np.int32), tree, engines=2, bundle_seconds=10)
    assert (bundles.engine[:-1] != bundles.engine[1:]).mean() > 0.9


def test_a_cut_prefers_the_cheapest_place_near_its_target() -> None:
    shared = np.array([0, 9, 9, 9, 2, 9, 9, 1, 9, 9], dtype=np.int32)
    assert cut(np.ones(10), shared, np.array([5.0]), 1.5) == [4]
    assert cut(np.ones(10), shared, np.array([5.0]), 2.5) == [7]
    assert cut(np.ones(3), shared[:3], np.array([1.0, 1.0, 2.9]), 0.1) == [1, 2]
