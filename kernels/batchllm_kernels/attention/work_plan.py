"""Work items of one prefix-shared attention step: which query tokens read which KV tokens, and how results are merged.

Host arithmetic on the block table and the lengths of a step, once per step for all layers. The maths and the layout of
the arrays are in the README of this folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from batchllm_kernels.attention.prefix_sharing import Bools, Int32s, Int64s, SharedPrefixes, find_shared_prefixes

ITEM_FIELDS = 8
ROW_START, ROW_COUNT, REQUEST, KV_START, KV_END, SPLIT, CAUSAL, WIDE = range(ITEM_FIELDS)
DIRECT = -1  # partial slot of a row that is written to the output at once


@dataclass(frozen=True, slots=True)
class PlanShape:
    """What a plan needs to know about the model and the kernel.

    Attributes:
        block_size: tokens of a KV block.
        queries_per_kv_head: query heads that read one KV head; they are folded into the rows of a tile.
        element_bytes: bytes of a number in the KV cache.
        narrow_tile_rows: rows (query tokens x heads of one KV head) of the tile that small items use.
        wide_tile_rows: rows of the tile that items with many query tokens use.
        target_items: work items per KV head that fill the device; long items are split until there are as many.
        minimum_split_tokens: KV tokens under which an item is never split.

    Raises:
        ValueError: when a tile has no room for the heads of one KV head, or a number is not positive.
    """

    block_size: int
    queries_per_kv_head: int
    element_bytes: int = 2
    narrow_tile_rows: int = 16
    wide_tile_rows: int = 64
    target_items: int = 64
    minimum_split_tokens: int = 256

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.narrow_tile_rows < self.queries_per_kv_head or self.wide_tile_rows < self.narrow_tile_rows:
            raise ValueError(
                f"tile rows: expected {self.queries_per_kv_head} heads per KV head <= narrow <= wide, "
                f"got {self.narrow_tile_rows} and {self.wide_tile_rows}"
            )

    @property
    def narrow_tile_tokens(self) -> int:
        """Query tokens of a narrow tile."""
        return self.narrow_tile_rows // self.queries_per_kv_head

    @property
    def wide_tile_tokens(self) -> int:
        """Query tokens of a wide tile."""
        return self.wide_tile_rows // self.queries_per_kv_head

    @property
    def partial_cost_tokens(self) -> float:
        """KV tokens that cost as much traffic as writing and reading one fp32 partial result of one query token."""
        # (heads x head_size x 4 bytes, written and read) over (keys and values, head_size x element_bytes)
        return self.queries_per_kv_head * 4 / self.element_bytes


@dataclass(frozen=True, slots=True)
class WorkPlan:
    """The work of one attention step.

    Attributes:
        items: int32 [items, 8], columns `ROW_START, ROW_COUNT, REQUEST, KV_START, KV_END, SPLIT, CAUSAL, WIDE`: the
            query tokens `rows[ROW_START:ROW_START + ROW_COUNT]` attend to the tokens `[KV_START, KV_END)` of REQUEST's
            block table row; longest first. In a CAUSAL item all rows are of REQUEST and see keys up to their own.
        rows: int32 [rows, 2], query token, and the slot of its partial result (plus the item's SPLIT), or `DIRECT`.
        merges: int32 [merges, 3], query token, its first partial slot, and the slot after its last; tokens with one
            partial result are written by their item and do not stand here.
        partials: number of partial slots.
        query_tokens: query tokens of the step.
        shared_tokens: KV tokens whose reading is shared (of all nodes that were kept), for the trace.
        block_size: tokens of a KV block.
        tile_rows: rows of a narrow and of a wide tile.
    """

    items: Int32s
    rows: Int32s
    merges: Int32s
    partials: int
    query_tokens: int
    shared_tokens: int
    block_size: int
    tile_rows: tuple[int, int]

    @property
    def kv_tokens_read(self) -> int:
        """KV tokens that the items read, summed over items; one KV head."""
        return int((self.items[:, KV_END].astype(np.int64) - self.items[:, KV_START]).sum())


def plan_work(
    block_table: Int32s, seq_lens: Int32s, query_start_loc: Int32s, shape: PlanShape, *, share: bool = True
) -> WorkPlan:
    """The work items of a step.

    Args:
        block_table: int32 [R, max_blocks], physical blocks of each request.
        seq_lens: int32 [R], tokens of each request, those of this step included.
        query_start_loc: int32 [R + 1], first query token of each request; a request without any is padding.
        shape: of the model and the kernel.
        share: False plans every request for itself.

    Raises:
        ValueError: when the arrays do not fit each other.

    The same step gives the same plan; requests in another order give the same items for the same tokens.
    """
    _check(block_table, seq_lens, query_start_loc, shape)
    query_start = query_start_loc.astype(np.int64)
    query_lens = query_start[1:] - query_start[:-1]
    own_start = np.zeros(len(query_lens), dtype=np.int64)
    shared = _nothing_shared()
    if share:
        context_blocks = (seq_lens - query_lens) // shape.block_size * (query_lens > 0)
        prefixes = find_shared_prefixes(block_table, context_blocks)
        shared = _worthwhile(prefixes, query_start, query_lens, own_start, shape)
    segments = shared.followed_by_own(query_start, query_lens, seq_lens.astype(np.int64), own_start)
    return _emit(segments, int(query_start[-1]), shape)


def _check(block_table: Int32s, seq_lens: Int32s, query_start_loc: Int32s, shape: PlanShape) -> None:
    requests = len(seq_lens)
    if block_table.ndim != 2 or len(block_table) != requests:
        raise ValueError(f"block_table: expected [{requests}, max_blocks], got {list(block_table.shape)}")
    if query_start_loc.shape != (requests + 1,):
        raise ValueError(f"query_start_loc: expected [{requests + 1}], got {list(query_start_loc.shape)}")
    query_lens = np.diff(query_start_loc)
    if requests and (query_start_loc[0] != 0 or query_lens.min() < 0):
        raise ValueError("query_start_loc: expected to start at 0 and never to fall")
    if (query_lens > seq_lens).any():
        request = int(np.argmax(query_lens > seq_lens))
        raise ValueError(
            f"seq_lens: expected at least the {query_lens[request]} query tokens of request {request}, "
            f"got {seq_lens[request]}"
        )
    longest = int((seq_lens * (query_lens > 0)).max(initial=0))  # padding may have any length
    if longest > block_table.shape[1] * shape.block_size:
        raise ValueError(
            f"seq_lens: expected at most {block_table.shape[1]} blocks of {shape.block_size} tokens, got {longest}"
        )


@dataclass(frozen=True, slots=True)
class _Segments:
    """Query tokens that attend to one run of KV tokens, as columns; not yet cut into tiles."""

    request: Int64s  # whose block table row is read
    kv_start: Int64s
    kv_end: Int64s
    row_count: Int64s
    row_token: Int64s  # query tokens of all segments, one segment after the other
    level_rows: list[int]  # rows of each level of the trie
    shared: int  # segments that are shared; they stand first

    def followed_by_own(
        self, query_start: Int64s, query_lens: Int64s, seq_lens: Int64s, own_start: Int64s
    ) -> _Segments:
        """With what each request reads alone: from the end of what it shares to its own query tokens."""
        requests = np.flatnonzero(query_lens)
        tokens = int(query_start[-1])
        return _Segments(
            request=np.concatenate([self.request, requests]),
            kv_start=np.concatenate([self.kv_start, own_start[requests]]),
            kv_end=np.concatenate([self.kv_end, seq_lens[requests]]),
            row_count=np.concatenate([self.row_count, query_lens[requests]]),
            row_token=np.concatenate([self.row_token, np.arange(tokens)]),
            level_rows=[*self.level_rows, tokens],
            shared=self.shared,
        )


def _nothing_shared() -> _Segments:
    empty = np.zeros(0, dtype=np.int64)
    return _Segments(empty, empty, empty, empty, empty, [], 0)


def _worthwhile(
    prefixes: SharedPrefixes, query_start: Int64s, query_lens: Int64s, own_start: Int64s, shape: PlanShape
) -> _Segments:
    """The nodes whose sharing saves more traffic than their partial results cost; `own_start` moves behind them.

    From the deepest level up, a node left out hands its blocks to whoever reads below it: `reads` counts those.
    """
    nodes = len(prefixes.parent)
    if not nodes:
        return _nothing_shared()
    first_member, member_count = prefixes.member_start[:-1], np.diff(prefixes.member_start)
    node_of_member = np.repeat(np.arange(nodes), member_count)
    member_tokens = query_lens[prefixes.members]
    tokens = np.add.reduceat(member_tokens, first_member)
    alone = np.add.reduceat(_tiles(member_tokens, shape), first_member)
    together = _tiles(tokens, shape)
    segment_tokens = (prefixes.end_block - prefixes.first_block) * shape.block_size
    reads = alone.copy()
    kept = np.zeros(nodes, dtype=bool)
    # two partial results a token: of the shared run, and of the rest, which would be written at once without it
    price = 2 * shape.partial_cost_tokens * tokens
    for level in range(len(prefixes.level_start) - 2, -1, -1):
        at = slice(prefixes.level_start[level], prefixes.level_start[level + 1])
        kept[at] = (reads[at] - together[at]) * segment_tokens[at] > price[at]
        reads[at] = np.where(kept[at], together[at], reads[at])
        if level:
            np.add.at(reads, prefixes.parent[at], reads[at] - alone[at])
    kv_start = _first_block_read(prefixes, kept) * shape.block_size
    kv_end = prefixes.end_block * shape.block_size
    # members stand level by level, so that the deepest kept node of a request is written last
    member_kept = kept[node_of_member]
    kept_members = prefixes.members[member_kept]
    own_start[kept_members] = kv_end[node_of_member[member_kept]]
    kept_tokens = tokens * kept
    return _Segments(
        request=prefixes.members[first_member[kept]],
        kv_start=kv_start[kept],
        kv_end=kv_end[kept],
        row_count=tokens[kept],
        row_token=_ragged_arange(query_start[kept_members], query_lens[kept_members]),
        level_rows=[int(kept_tokens[a:b].sum()) for a, b in pairwise(prefixes.level_start)],
        shared=int(kept.sum()),
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


def _tiles(tokens: Int64s, shape: PlanShape) -> Int64s:
    """Tiles that a number of query tokens fills: so often is each KV token read. What fits a narrow tile is one."""
    return -(-tokens // shape.wide_tile_tokens)


def _emit(segments: _Segments, query_tokens: int, shape: PlanShape) -> WorkPlan:
    """Cuts segments into tiles of query tokens and tiles into splits of KV tokens, and numbers the partial results."""
    segment, earlier = _ragged(_tiles(segments.row_count, shape))
    left = segments.row_count[segment] - earlier * shape.wide_tile_tokens
    row_count = np.minimum(left, shape.wide_tile_tokens)
    causal = segment >= segments.shared
    kv_start = segments.kv_start[segment]
    kv_end = segments.kv_end[segment] - (left - row_count) * causal
    splits, split_tokens = _splits(kv_end - kv_start, row_count, shape)

    rows, merges, partials = _number_partials(segments, np.repeat(splits, row_count), query_tokens)
    tile, split = _ragged(splits)
    start = kv_start[tile] + split * split_tokens[tile]
    end = np.minimum(kv_end[tile], start + split_tokens[tile])
    items = np.empty((len(tile), ITEM_FIELDS), dtype=np.int32)
    items[:, ROW_START] = (row_count.cumsum() - row_count)[tile]
    items[:, ROW_COUNT] = row_count[tile]
    items[:, REQUEST] = segments.request[segment][tile]
    items[:, KV_START] = start
    items[:, KV_END] = end
    items[:, SPLIT] = split
    items[:, CAUSAL] = causal[tile]
    items[:, WIDE] = (row_count > shape.narrow_tile_tokens)[tile]
    longest_first = (start - end).argsort(kind="stable")
    return WorkPlan(
        items=items.take(longest_first, axis=0),
        rows=rows,
        merges=merges,
        partials=partials,
        query_tokens=query_tokens,
        shared_tokens=int((segments.kv_end - segments.kv_start)[: segments.shared].sum()),
        block_size=shape.block_size,
        tile_rows=(shape.narrow_tile_rows, shape.wide_tile_rows),
    )


def _splits(kv_tokens: Int64s, row_count: Int64s, shape: PlanShape) -> tuple[Int64s, Int64s]:
    """Splits of each tile, and the KV tokens of one (whole blocks where there are several), so that about
    `target_items` like items result.

    A split reads at least four times what its partial results cost.
    """
    shortest = max(shape.minimum_split_tokens, -(-int(kv_tokens.sum()) // shape.target_items))
    longest = np.maximum(shortest, int(4 * shape.partial_cost_tokens) * row_count)
    splits, split_tokens = np.ones_like(kv_tokens), kv_tokens.copy()
    long = np.flatnonzero(kv_tokens > longest)
    tokens = kv_tokens[long]
    blocks = -(-tokens // (-(-tokens // longest[long]) * shape.block_size))
    split_tokens[long] = blocks * shape.block_size
    splits[long] = -(-tokens // split_tokens[long])
    return splits, split_tokens


def _number_partials(segments: _Segments, row_splits: Int64s, query_tokens: int) -> tuple[Int32s, Int32s, int]:
    """Slots of the partial results: those of one token stand together, in the order of its KV tokens.

    A level names a token at most once, and levels stand from the start of the prompt on, the own parts last.
    """
    token = segments.row_token
    before = np.empty(len(token), dtype=np.int64)
    per_token = np.zeros(query_tokens, dtype=np.int64)
    start = 0
    for rows_of_level in segments.level_rows[:-1]:
        at = slice(start, start + rows_of_level)
        before[at] = per_token[token[at]]
        per_token[token[at]] += row_splits[at]
        start += rows_of_level
    before[start:] = per_token  # the own parts name every token once, in order
    per_token += row_splits[start:]
    tokens = np.flatnonzero(per_token > 1)
    merges = np.empty((len(tokens), 3), dtype=np.int32)
    end = per_token[tokens].cumsum()
    merges[:, 0] = tokens
    merges[:, 1] = end - per_token[tokens]
    merges[:, 2] = end
    token_start = np.full(query_tokens, DIRECT, dtype=np.int64)
    token_start[tokens] = merges[:, 1]
    rows = np.empty((len(token), 2), dtype=np.int32)
    rows[:, 0] = token
    rows[:, 1] = token_start[token] + before  # before is 0 where a token has one partial result
    return rows, merges, int(end[-1]) if len(end) else 0


def _ragged(count: Int64s) -> tuple[Int64s, Int64s]:
    """For each of `count[i]` things of each i: i, and the thing's number among those of i."""
    owner = np.repeat(np.arange(len(count)), count)
    return owner, np.arange(len(owner)) - (count.cumsum() - count)[owner]


def _ragged_arange(start: Int64s, count: Int64s) -> Int64s:
    """`start[i], start[i] + 1, ...` (`count[i]` numbers) for each i, joined."""
    owner, number = _ragged(count)
    return start[owner] + number
