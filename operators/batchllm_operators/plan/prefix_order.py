"""Requests in an order in which every shared prefix is one range.

Positions are places in this order. All depths are in full KV blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchllm_operators.columns.arrays import Bools, Int32s, Int64s, UInt64s
from batchllm_operators.columns.compiled import compiled
from batchllm_operators.plan.block_hashes import HASH_BYTES, BlockHashes

_SMALL = 24
"""Ranges up to this size are sorted by insertion."""


@dataclass(frozen=True, slots=True)
class PrefixOrder:
    """The sorted requests.

    Attributes:
        rows: int64 [N], the request at each position.
        shared_blocks: int32 [N], full blocks shared with the request before; 0 at the first.
    """

    rows: Int64s
    shared_blocks: Int32s

    def only(self, kept: Bools) -> PrefixOrder:
        """The same order with some requests left out.

        Args:
            kept: bool [requests], which requests stay.
        """
        staying = np.flatnonzero(kept[self.rows])
        return PrefixOrder(self.rows[staying], shared_among(self.shared_blocks, staying))


def shared_among(shared_blocks: Int32s, places: Int64s) -> Int32s:
    """Blocks that each of some requests of a depth-first order shares with the one before it among them.

    Args:
        shared_blocks: int32 [N], blocks shared with the request before, of the whole order.
        places: int64 [M], the places that are kept, increasing.
    """
    if len(places) == 0:
        return shared_blocks[:0]
    # Two requests share the least that any neighbours between them share.
    starts = np.concatenate(([0], places[:-1] + 1))
    shared = np.minimum.reduceat(shared_blocks[: places[-1] + 1], starts)
    shared[0] = 0
    return shared


def hit_blocks(shared_blocks: Int32s, prompt_tokens: Int32s, block_size: int) -> Int32s:
    """Blocks that each request takes from an engine's cache: whole blocks, and never its last token.

    Args:
        shared_blocks: int32 [N], full blocks already computed by others.
        prompt_tokens: int32 [N]; empty prompts take nothing.
        block_size: tokens of a block.
    """
    return np.minimum(shared_blocks, usable_blocks(prompt_tokens, block_size))


def usable_blocks(prompt_tokens: Int32s, block_size: int) -> Int32s:
    """The most blocks that each request can take from a cache; int32 [N]."""
    return (np.maximum(prompt_tokens - 1, 0) // block_size).astype(np.int32)


def sort_by_prefix(hashes: BlockHashes, keys: UInt64s, *, window_bytes: int | None = None) -> PrefixOrder:
    """Sort requests so that every shared prefix is one range, shorter requests before those that continue them.

    Of requests with the same blocks those without a further token come first: they compute the last of them in any
    case. Then the order depends on the requests alone, not on the order they come in: siblings stand by hash, and
    requests with the same blocks by key. Work grows with the blocks that are shared, plus one sort.

    Args:
        hashes: block hashes of N requests.
        keys: uint64 [N, 2], distinct request keys as big-endian words.
        window_bytes: most bytes of hashes to hold in memory, for hashes that stand on a disk. A few levels at a time
            (one at least) are then copied, of those requests that share all levels before. The order is the same.
    """
    count = len(hashes.blocks)
    rows = np.arange(count, dtype=np.int64)
    shared = np.zeros(count, dtype=np.int32)
    # A range holds at least two requests: a single one is in order.
    ranges = np.array([[0, count]], dtype=np.int64)[: count // 2]
    depth, levels = 0, int(hashes.blocks.max(initial=0)) + 1
    while len(ranges):
        window = hashes
        if window_bytes is not None:
            open_rows = np.concatenate([rows[low:high] for low, high in ranges])
            levels = max(window_bytes // (HASH_BYTES * len(open_rows)), 1)
            window = hashes.levels(open_rows, depth, levels)
        ranges = _refine(
            rows, shared, ranges, depth, depth + levels, window.starts, window.blocks, window.whole, window.lanes, keys
        )
        depth += levels
    return PrefixOrder(rows, shared)


@compiled
def _refine(
    rows: Int64s,
    shared: Int32s,
    open_ranges: Int64s,
    from_depth: int,
    to_depth: int,
    starts: Int64s,
    blocks: Int32s,
    whole: Bools,
    lanes: UInt64s,
    keys: UInt64s,
) -> Int64s:
    """Sort ranges that agree in their first blocks by the next, until each is one request or agrees to `to_depth`.

    Returns the ranges that agree to `to_depth`.
    """
    ranges = [(int(low), int(high), from_depth) for low, high in open_ranges]
    agreeing = np.empty((len(rows) // 2, 2), dtype=np.int64)
    agreed = 0
    while len(ranges) > 0:
        low, high, depth = ranges.pop()
        # Long shared prefixes: go on while all agree, without sorting.
        while depth < to_depth and _all_agree(rows, low, high, depth, starts, blocks, lanes):
            depth += 1
        if depth == to_depth:
            agreeing[agreed, 0], agreeing[agreed, 1] = low, high
            agreed += 1
            continue
        middle = low
        for position in range(low, high):
            if blocks[rows[position]] == depth:
                rows[position], rows[middle] = rows[middle], rows[position]
                middle += 1
        without_more = low
        for position in range(low, middle):
            if whole[rows[position]]:
                rows[position], rows[without_more] = rows[without_more], rows[position]
                without_more += 1
        _sort(rows, low, without_more, keys, starts[:0], 0)
        _sort(rows, without_more, middle, keys, starts[:0], 0)
        shared[low + 1 : min(middle + 1, high)] = depth
        _sort(rows, middle, high, lanes, starts, depth)
        begin = middle
        for position in range(middle + 1, high + 1):
            if position < high:
                here, before = starts[rows[position]] + depth, starts[rows[position - 1]] + depth
                if lanes[here, 0] == lanes[before, 0] and lanes[here, 1] == lanes[before, 1]:
                    continue
                shared[position] = depth
            if position - begin > 1:
                ranges.append((begin, position, depth + 1))
            begin = position
    return agreeing[:agreed].copy()


@compiled
def _all_agree(rows: Int64s, low: int, high: int, depth: int, starts: Int64s, blocks: Int32s, lanes: UInt64s) -> bool:
    if blocks[rows[low]] <= depth:
        return False
    first = starts[rows[low]] + depth
    for position in range(low + 1, high):
        row = rows[position]
        if blocks[row] <= depth:
            return False
        here = starts[row] + depth
        if lanes[here, 0] != lanes[first, 0] or lanes[here, 1] != lanes[first, 1]:
            return False
    return high - low > 1


@compiled
def _sort(rows: Int64s, low: int, high: int, pairs: UInt64s, starts: Int64s, depth: int) -> None:
    """Sort a range by the pair at `starts[row] + depth`, or at `row` when there are no starts."""
    if high - low < 2:
        return
    if high - low > _SMALL:
        words = np.empty(high - low, dtype=np.uint64)
        for position in range(low, high):
            row = rows[position]
            words[position - low] = pairs[starts[row] + depth if len(starts) > 0 else row, 0]
        rows[low:high] = rows[low:high][np.argsort(words)]
    # Sorts small ranges; in large ones it only settles equal first words, which are equal pairs or 64-bit collisions.
    for position in range(low + 1, high):
        row = rows[position]
        here = starts[row] + depth if len(starts) > 0 else row
        a, b = pairs[here, 0], pairs[here, 1]
        place = position
        while place > low:
            other_row = rows[place - 1]
            other = starts[other_row] + depth if len(starts) > 0 else other_row
            if pairs[other, 0] < a or (pairs[other, 0] == a and pairs[other, 1] <= b):
                break
            rows[place] = other_row
            place -= 1
        rows[place] = row
