"""Packing the engine order into bundles, for equal finish over several engines.

A top-level tree stays on one engine unless it alone is worth more than a fair share of the job; then fair shares are
cut off it, near the ideal place where the two sides share least, because what they share is computed on both. Whole
trees and remainders are dealt longest first to the engine with the least work. Each engine's requests keep the engine
order, and are cut into bundles the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchllm_operators.columns.arrays import Floats, Int32s, Int64s
from batchllm_operators.columns.compiled import compiled
from batchllm_operators.plan.prefix_order import shared_among

CUT_TOLERANCE = 0.25
"""How far a cut may lie from the ideal place, as a share of the piece."""


@dataclass(frozen=True, slots=True)
class Bundles:
    """Bundles in the order of their dispatch.

    Attributes:
        places: int64 [N], places of the engine order, bundle after bundle.
        offsets: int64 [bundles + 1] into `places`.
        engine: int32 [bundles], the engine that each is meant for.
        shared_blocks: int32 [N], blocks that the request at each of `places` shares with the one before it on its
            engine.
    """

    places: Int64s
    offsets: Int64s
    engine: Int32s
    shared_blocks: Int32s


def pack_bundles(
    seconds: Floats, shared_blocks: Int32s, tree: Int32s, *, engines: int, bundle_seconds: float
) -> Bundles:
    """Pack requests in engine order into bundles.

    Args:
        seconds: float64 [N], estimated engine seconds of each request.
        shared_blocks: int32 [N], blocks shared with the request before: what a cut there costs.
        tree: int32 [N], top-level tree of each request; increasing.
        engines: the number of engines that take bundles.
        bundle_seconds: bound of a bundle's seconds; only a single request may exceed it.
    """
    count = len(seconds)
    if count == 0:
        return Bundles(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))
    engine = _deal(seconds, shared_blocks, tree, engines)
    bundles: list[tuple[float, int, Int64s, Int32s]] = []
    for number in range(engines):
        mine = np.flatnonzero(engine == number).astype(np.int64)
        if len(mine) == 0:
            continue
        shared = shared_among(shared_blocks, mine)
        clock = 0.0
        for low, high in _pieces(seconds[mine], shared, bundle_seconds):
            bundles.append((clock, number, mine[low:high], shared[low:high]))
            clock += float(seconds[mine[low:high]].sum())
    bundles.sort(key=lambda bundle: bundle[:2])
    return Bundles(
        places=np.concatenate([places for _, _, places, _ in bundles]),
        offsets=np.cumsum([0] + [len(places) for _, _, places, _ in bundles], dtype=np.int64),
        engine=np.array([number for _, number, _, _ in bundles], dtype=np.int32),
        shared_blocks=np.concatenate([shared for _, _, _, shared in bundles]),
    )


def cut(seconds: Floats, shared_blocks: Int32s, targets: Floats, tolerance: float) -> list[int]:
    """Places near the given targets where the least is shared with the request before.

    Args:
        seconds: float64 [N].
        shared_blocks: int32 [N].
        targets: ideal places, in seconds from the start, increasing.
        tolerance: seconds that a cut may lie before or after its target.

    Returns:
        Places, increasing, each greater than 0 and less than N; fewer than targets where two fall together.
    """
    elapsed = np.cumsum(seconds)
    cuts: list[int] = []
    for target in targets:
        least = cuts[-1] + 1 if cuts else 1
        # A cut at place p comes after elapsed[p - 1] seconds.
        low = max(int(np.searchsorted(elapsed, target - tolerance)) + 1, least)
        high = min(int(np.searchsorted(elapsed, target + tolerance, side="right")) + 1, len(seconds))
        if low >= high:
            nearest = int(np.searchsorted(elapsed, target)) + 1
            low, high = max(nearest, least), max(nearest, least) + 1
            if low >= len(seconds):
                break
        window = shared_blocks[low:high]
        cheapest = low + np.flatnonzero(window == window.min())
        cuts.append(int(cheapest[np.argmin(np.abs(elapsed[cheapest - 1] - target))]))
    return cuts


def _pieces(seconds: Floats, shared_blocks: Int32s, bound: float) -> list[tuple[int, int]]:
    """Ranges of like size, none above the bound where the requests allow it."""
    total = float(seconds.sum())
    # Room for the tolerance, so that a cut that lies late keeps the bound.
    pieces = int(np.ceil(total / (bound * (1 - CUT_TOLERANCE)))) if total > bound else 1
    size = total / pieces
    cuts = cut(seconds, shared_blocks, np.arange(1, pieces, dtype=np.float64) * size, (bound - size) / 2)
    return list(zip([0, *cuts], [*cuts, len(seconds)], strict=True))


def _deal(seconds: Floats, shared_blocks: Int32s, tree: Int32s, engines: int) -> Int32s:
    """The engine of each request."""
    if engines == 1:
        return np.zeros(len(seconds), dtype=np.int32)
    fair = float(seconds.sum()) / engines
    tree_starts = np.flatnonzero(np.diff(tree, prepend=-1))
    starts = [tree_starts]
    for begin, end, total in zip(
        tree_starts, np.append(tree_starts[1:], len(tree)), np.add.reduceat(seconds, tree_starts), strict=True
    ):
        if total > fair * (1 + 1e-9) and end - begin > 1:
            shares = np.arange(1, int(np.ceil(total / fair)), dtype=np.float64) * fair
            cuts = cut(seconds[begin:end], shared_blocks[begin:end], shares, fair * CUT_TOLERANCE / engines)
            starts.append(begin + np.array(cuts, dtype=np.int64))
    unit_starts = np.sort(np.concatenate(starts))
    unit_seconds = np.add.reduceat(seconds, unit_starts)
    longest_first = np.argsort(-unit_seconds, kind="stable")
    unit_engine = _least_loaded(unit_seconds, longest_first, engines)
    return np.repeat(unit_engine, np.diff(np.append(unit_starts, len(seconds))))


@compiled
def _least_loaded(seconds: Floats, longest_first: Int64s, engines: int) -> Int32s:
    load = np.zeros(engines, dtype=np.float64)
    engine = np.empty(len(seconds), dtype=np.int32)
    for unit in longest_first:
        least = np.argmin(load)
        engine[unit] = least
        load[least] += seconds[unit]
    return engine
