"""Which shared runs of blocks are worth reading together: those that save more traffic than partial results cost."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from batchllm_kernels.arrays import Bools, Int64s
from batchllm_kernels.attention.prefix_sharing import SharedPrefixes


@dataclass(frozen=True, slots=True)
class SharedRuns:
    """Runs of KV tokens that are read by several requests together, as columns; a parent stands before its children.

    Attributes:
        request: int64 [runs], whose block table row is read.
        kv_start, kv_end: int64 [runs], tokens; whole blocks.
        row_count: int64 [runs], requests that share the run.
        row_token: int64 [sum of row_count], their query tokens, one run after the other.
        level_rows: rows of each level of the trie; a level names a token at most once.
    """

    request: Int64s
    kv_start: Int64s
    kv_end: Int64s
    row_count: Int64s
    row_token: Int64s
    level_rows: list[int]


def no_runs() -> SharedRuns:
    """The runs of a step that shares nothing."""
    empty = np.zeros(0, dtype=np.int64)
    return SharedRuns(empty, empty, empty, empty, empty, [])


def worthwhile_runs(
    prefixes: SharedPrefixes, block_size: int, tile_tokens: int, partial_cost_tokens: float
) -> SharedRuns:
    """The runs of a trie whose sharing saves more traffic than their partial results cost.

    Args:
        prefixes: of a step in which every request has one query token.
        block_size: tokens of a KV block.
        tile_tokens: query tokens that read a KV token together.
        partial_cost_tokens: KV tokens that cost as much traffic as one partial result of one query token.

    From the deepest level up, a node left out hands its blocks to whoever reads below it: `reads` counts how often
    each of its KV tokens would then be read.
    """
    count = len(prefixes.parent)
    if not count:
        return no_runs()
    first_member, members = prefixes.member_start[:-1], np.diff(prefixes.member_start)
    together = -(-members // tile_tokens)
    kv_tokens = (prefixes.end_block - prefixes.first_block) * block_size
    price = partial_cost_tokens * members
    reads = members.copy()
    kept = np.zeros(count, dtype=bool)
    for level in range(len(prefixes.level_start) - 2, -1, -1):
        at = slice(prefixes.level_start[level], prefixes.level_start[level + 1])
        kept[at] = (reads[at] - together[at]) * kv_tokens[at] > price[at]
        reads[at] = np.where(kept[at], together[at], reads[at])
        if level:
            np.add.at(reads, prefixes.parent[at], reads[at] - members[at])
    kept_rows = members * kept
    return SharedRuns(
        request=prefixes.members[first_member[kept]],
        kv_start=_first_block_read(prefixes, kept)[kept] * block_size,
        kv_end=prefixes.end_block[kept] * block_size,
        row_count=members[kept],
        row_token=prefixes.members[np.repeat(kept, members)],
        level_rows=[int(kept_rows[a:b].sum()) for a, b in pairwise(prefixes.level_start)],
    )


def _first_block_read(prefixes: SharedPrefixes, kept: Bools) -> Int64s:
    """int64 [nodes]: the end of the nearest kept ancestor, where a node's reading starts."""
    start = np.zeros(len(kept), dtype=np.int64)
    read_to = np.where(kept, prefixes.end_block, 0)
    for level in range(1, len(prefixes.level_start) - 1):
        at = slice(prefixes.level_start[level], prefixes.level_start[level + 1])
        start[at] = read_to[prefixes.parent[at]]
        read_to[at] = np.where(kept[at], read_to[at], start[at])
    return start
