"""Work items of the decode rows of a step: which of them read which KV tokens together, and which alone.

Host arithmetic on the block table and the lengths of the rows, once per step for all layers. The maths and the layout
of the arrays are in the README of this folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from batchllm_kernels.arrays import Int32s, Int64s
from batchllm_kernels.attention.prefix_sharing import find_shared_prefixes
from batchllm_kernels.attention.shared_runs import SharedRuns, no_runs, worthwhile_runs

DIRECT = -1  # OUT_SLOT of an own item that writes the output
OWN_SPLIT_FACTOR = 4  # an own range that is split needs another launch, so that only long ones are
STRAGGLER = 4  # on a device that is full, an own range is split when it is so many times as long as a program's share


class SharedItem(IntEnum):
    """Columns of `WorkPlan.shared_items`."""

    ROW_START = 0
    ROW_COUNT = 1
    REQUEST = 2
    KV_START = 3
    KV_END = 4
    SPLIT = 5


class OwnItem(IntEnum):
    """Columns of `WorkPlan.own_items`."""

    TOKEN = 0
    KV_START = 1
    KV_END = 2
    FIRST_SLOT = 3
    END_SLOT = 4
    OUT_SLOT = 5


class Merge(IntEnum):
    """Columns of `WorkPlan.merges`."""

    TOKEN = 0
    FIRST_SLOT = 1
    END_SLOT = 2


class Node(IntEnum):
    """Columns of `WorkPlan.nodes`."""

    REQUEST = 0
    KV_START = 1
    KV_END = 2


@dataclass(frozen=True, slots=True)
class WorkPlanShape:
    """What a plan needs to know about the model and the kernels.

    Attributes:
        block_size: tokens of a KV block.
        queries_per_kv_head: query heads that read one KV head; they are folded into the rows of a tile.
        element_bytes: bytes of a number in the KV cache.
        shared_tile_rows: rows (query tokens x heads of one KV head) of the tile of a shared item.
        target_items: shared items per KV head that fill the device; where there are fewer, long ones are split.
        own_target_items: own items per KV head that do; they are smaller.
        minimum_split_tokens: KV tokens under which a shared item is never split; four times as many for own items.

    Raises:
        ValueError: when a tile has no room for the heads of one KV head, or a number is not positive.
    """

    block_size: int
    queries_per_kv_head: int
    element_bytes: int = 2
    shared_tile_rows: int = 64
    target_items: int = 64
    own_target_items: int = 64
    minimum_split_tokens: int = 64

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.shared_tile_rows < self.queries_per_kv_head:
            raise ValueError(
                f"shared_tile_rows: expected at least the {self.queries_per_kv_head} heads of a KV head, "
                f"got {self.shared_tile_rows}"
            )

    @property
    def shared_tile_tokens(self) -> int:
        """Query tokens of the tile of a shared item."""
        return self.shared_tile_rows // self.queries_per_kv_head

    @property
    def partial_cost_tokens(self) -> float:
        """KV tokens that cost as much traffic as writing and reading one fp32 partial result of one query token."""
        # (heads x head_size x 4 bytes, written and read) over (keys and values, head_size x element_bytes)
        return self.queries_per_kv_head * 4 / self.element_bytes


@dataclass(frozen=True, slots=True)
class WorkPlan:
    """The work of the decode rows of one step. A row is a request with one query token: token i is row i.

    Attributes:
        shared_items: int32 [shared items, 6], columns `SharedItem`: the query tokens
            `shared_rows[ROW_START:ROW_START + ROW_COUNT]` attend to all tokens `[KV_START, KV_END)` of REQUEST's block
            table row, and write partial results. Longest first; items that read the same keys stand together.
        shared_rows: int32 [shared rows, 2], query token, and the slot of its partial result of the first split; that of
            split s is s further on.
        own_items: int32 [own items, 6], columns `OwnItem`: the token takes in the partial results
            `[FIRST_SLOT, END_SLOT)`, which may be none, and attends to the tokens `[KV_START, KV_END)` of its own block
            table row. It writes the output where OUT_SLOT is `DIRECT`, else a partial result there. Longest first.
        merges: int32 [merges, 3], columns `Merge`: tokens whose own range is split, and the slots of those partial
            results, the first of which has taken in the shared ones.
        nodes: int32 [nodes, 3], columns `Node`: the shared runs before they are cut into items.
        node_row_start: int32 [nodes + 1], `shared_rows` of each node.
        partials: number of partial slots. Those of split own ranges stand first, then the shared ones; of either kind,
            those of one token stand together, in the order of its keys. Every one is written once and read once.
        own_partials: how many of them are of split own ranges.
        query_tokens: rows of the block table, padding included.
        shared_tokens: KV tokens of all nodes: read by several requests together.
        block_size: tokens of a KV block.
        shared_tile_rows: of the shape that the plan was made for.
    """

    shared_items: Int32s
    shared_rows: Int32s
    own_items: Int32s
    merges: Int32s
    nodes: Int32s
    node_row_start: Int32s
    partials: int
    own_partials: int
    query_tokens: int
    shared_tokens: int
    block_size: int
    shared_tile_rows: int

    @property
    def shared_kv_tokens_read(self) -> int:
        """KV tokens that shared items read, summed over items; one KV head."""
        columns = self.shared_items[:, [SharedItem.KV_START, SharedItem.KV_END]]
        return int(np.diff(columns.astype(np.int64)).sum())

    @property
    def own_kv_tokens_read(self) -> int:
        """KV tokens that own items read, summed over items; one KV head."""
        columns = self.own_items[:, [OwnItem.KV_START, OwnItem.KV_END]]
        return int(np.diff(columns.astype(np.int64)).sum())

    @property
    def kv_tokens_read(self) -> int:
        """KV tokens that all items read, summed over items; one KV head."""
        return self.shared_kv_tokens_read + self.own_kv_tokens_read

    @property
    def shared_queries_read(self) -> int:
        """Query tokens that shared items read, summed over items. An own item reads one."""
        return int(self.shared_items[:, SharedItem.ROW_COUNT].sum(dtype=np.int64))


def plan_work(block_table: Int32s, seq_lens: Int32s, shape: WorkPlanShape, *, share: bool = True) -> WorkPlan:
    """The work items of the decode rows of a step.

    Args:
        block_table: int32 [D, max_blocks], physical blocks of each row.
        seq_lens: int32 [D], tokens of each row; the last is its query token. A row of length 0 is padding.
        shape: of the model and the kernels.
        share: False plans every row for itself.

    Raises:
        ValueError: when the arrays do not fit each other.

    The same step gives the same plan; rows in another order give the same items for the same tokens.
    """
    _check(block_table, seq_lens, shape)
    lengths = seq_lens.astype(np.int64)
    nodes = no_runs()
    if share:
        # the block of the query token itself is never shared, so that no mask is needed
        prefixes = find_shared_prefixes(block_table, (lengths - 1) // shape.block_size)
        nodes = worthwhile_runs(prefixes, shape.block_size, shape.shared_tile_tokens, shape.partial_cost_tokens)
    node_splits = _node_splits(nodes, shape)
    own = _own_ranges(nodes, lengths, shape)
    slots = _number_slots(nodes, node_splits.count, own)
    return WorkPlan(
        shared_items=_shared_items(nodes, node_splits, shape),
        shared_rows=_columns(nodes.row_token, slots.of_row),
        own_items=_own_items(own, slots),
        merges=_merges(own, slots),
        nodes=_columns(nodes.request, nodes.kv_start, nodes.kv_end),
        node_row_start=np.append(0, nodes.row_count.cumsum()).astype(np.int32),
        partials=slots.total,
        own_partials=slots.own,
        query_tokens=len(lengths),
        shared_tokens=int((nodes.kv_end - nodes.kv_start).sum()),
        block_size=shape.block_size,
        shared_tile_rows=shape.shared_tile_rows,
    )


def _check(block_table: Int32s, seq_lens: Int32s, shape: WorkPlanShape) -> None:
    if seq_lens.ndim != 1:
        raise ValueError(f"seq_lens: expected [rows], got {list(seq_lens.shape)}")
    if block_table.ndim != 2 or len(block_table) != len(seq_lens):
        raise ValueError(f"block_table: expected [{len(seq_lens)}, max_blocks], got {list(block_table.shape)}")
    shortest, longest = int(seq_lens.min(initial=0)), int(seq_lens.max(initial=0))
    if shortest < 0:
        raise ValueError(f"seq_lens: expected 0 or more tokens, got {shortest}")
    if longest > block_table.shape[1] * shape.block_size:
        raise ValueError(
            f"seq_lens: expected at most {block_table.shape[1]} blocks of {shape.block_size} tokens, got {longest}"
        )


@dataclass(frozen=True, slots=True)
class _Splits:
    """How KV ranges are cut: the number of splits of each, and the KV tokens of one (the last may have fewer)."""

    count: Int64s
    tokens: Int64s


def _split(kv_tokens: Int64s, longest: Int64s, shape: WorkPlanShape) -> _Splits:
    """Ranges that are longer than `longest` in splits of like size, of whole blocks, about so long.

    The number of splits is rounded, not raised: one more than fit the device at once would wait for all the others.
    """
    count, split_tokens = np.ones_like(kv_tokens), kv_tokens.copy()
    long = np.flatnonzero(kv_tokens > longest)
    if len(long):
        tokens = kv_tokens[long]
        pieces = np.maximum(1, (tokens + longest[long] // 2) // longest[long])
        split_tokens[long] = -(-tokens // (pieces * shape.block_size)) * shape.block_size
        count[long] = -(-tokens // split_tokens[long])
    return _Splits(count, split_tokens)


def _longest(reading: int, rows: Int64s, shape: WorkPlanShape, target_items: int) -> Int64s:
    """KV tokens of the longest item: a program's share of what is read, and at least as much traffic as the partial
    results of its rows.

    Where the device is full, nothing is split. Where it is not, a split costs traffic that nobody else has use for, and
    saves time: a program takes a few microseconds for a tile of keys however idle the device is.
    """
    shortest = max(shape.minimum_split_tokens, -(-reading // target_items))
    return np.maximum(shortest, int(shape.partial_cost_tokens) * rows)


def _node_splits(nodes: SharedRuns, shape: WorkPlanShape) -> _Splits:
    """All tiles of a node are split alike, so that a token's splits do not depend on who shares its tile."""
    kv_tokens = nodes.kv_end - nodes.kv_start
    tiles = -(-nodes.row_count // shape.shared_tile_tokens)
    rows_of_tile = np.minimum(nodes.row_count, shape.shared_tile_tokens)
    return _split(kv_tokens, _longest(int((tiles * kv_tokens).sum()), rows_of_tile, shape, shape.target_items), shape)


@dataclass(frozen=True, slots=True)
class _OwnRanges:
    """What each row that is no padding reads alone, as columns; never empty, since it has the query token."""

    token: Int64s
    kv_start: Int64s
    kv_end: Int64s
    splits: _Splits


def _own_ranges(nodes: SharedRuns, lengths: Int64s, shape: WorkPlanShape) -> _OwnRanges:
    """The range from the end of what a row shares to its query token."""
    start = np.zeros(len(lengths), dtype=np.int64)
    start[nodes.row_token] = np.repeat(nodes.kv_end, nodes.row_count)  # of the deepest node, which stands last
    token = np.flatnonzero(lengths)
    kv_start, kv_end = start[token], lengths[token]
    kv_tokens = kv_end - kv_start
    shares = 1 if len(token) < shape.own_target_items else STRAGGLER
    reading = int(kv_tokens.sum()) * shares
    longest = _longest(reading, np.ones_like(token), shape, shape.own_target_items)
    longest = np.maximum(longest, OWN_SPLIT_FACTOR * shape.minimum_split_tokens)
    return _OwnRanges(token, kv_start, kv_end, _split(kv_tokens, longest, shape))


@dataclass(frozen=True, slots=True)
class _Slots:
    """Slots of partial results: first those of split own ranges, then the shared ones, token by token."""

    of_row: Int64s  # [shared rows], of the first split
    first_shared: Int64s  # [own ranges]
    end_shared: Int64s  # [own ranges], the slot after the last shared one
    first_own: Int64s  # [own ranges]
    own: int
    total: int


def _number_slots(nodes: SharedRuns, node_splits: Int64s, own: _OwnRanges) -> _Slots:
    row_splits = np.repeat(node_splits, nodes.row_count)
    before = np.zeros(len(row_splits), dtype=np.int64)
    tokens = int(own.token[-1]) + 1 if len(own.token) else 0
    shared = np.zeros(tokens, dtype=np.int64)
    start = 0
    for rows_of_level in nodes.level_rows:
        at = slice(start, start + rows_of_level)
        token = nodes.row_token[at]
        before[at] = shared[token]
        shared[token] += row_splits[at]
        start += rows_of_level
    own_slots = own.splits.count * (own.splits.count > 1)
    own_total = int(own_slots.sum())
    end = own_total + shared.cumsum()
    first = end - shared
    return _Slots(
        of_row=first[nodes.row_token] + before,
        first_shared=first[own.token],
        end_shared=end[own.token],
        first_own=own_slots.cumsum() - own_slots,
        own=own_total,
        total=int(end[-1]) if tokens else 0,
    )


def _shared_items(nodes: SharedRuns, splits: _Splits, shape: WorkPlanShape) -> Int32s:
    """Nodes cut into tiles of rows and splits of KV tokens; the tiles that read the same keys stand together."""
    tiles = -(-nodes.row_count // shape.shared_tile_tokens)
    node, number = _ragged(tiles * splits.count)
    split, tile = number // tiles[node], number % tiles[node]
    first_row = tile * shape.shared_tile_tokens
    kv_start = nodes.kv_start[node] + split * splits.tokens[node]
    kv_end = np.minimum(nodes.kv_end[node], kv_start + splits.tokens[node])
    items = _columns(
        (nodes.row_count.cumsum() - nodes.row_count)[node] + first_row,
        np.minimum(nodes.row_count[node] - first_row, shape.shared_tile_tokens),
        nodes.request[node],
        kv_start,
        kv_end,
        split,
    )
    return _longest_first(items, kv_end - kv_start)


def _own_items(own: _OwnRanges, slots: _Slots) -> Int32s:
    several = own.splits.count > 1
    if several.any():
        of, split = _ragged(own.splits.count)
        kv_start = own.kv_start[of] + split * own.splits.tokens[of]
        kv_end = np.minimum(own.kv_end[of], kv_start + own.splits.tokens[of])
        token, first_slot, end_slot = own.token[of], slots.first_shared[of], slots.end_shared[of]
        out_slot = np.where(several[of], slots.first_own[of] + split, DIRECT)
        end_slot[split > 0] = first_slot[split > 0]
    else:  # the same in a fraction of the time
        kv_start, kv_end, token = own.kv_start, own.kv_end, own.token
        first_slot, end_slot = slots.first_shared, slots.end_shared
        out_slot = np.full(len(token), DIRECT, dtype=np.int64)
    items = _columns(token, kv_start, kv_end, first_slot, end_slot, out_slot)
    return _longest_first(items, kv_end - kv_start)


def _merges(own: _OwnRanges, slots: _Slots) -> Int32s:
    several = np.flatnonzero(own.splits.count > 1)
    first = slots.first_own[several]
    return _columns(own.token[several], first, first + own.splits.count[several])


def _longest_first(items: Int32s, kv_tokens: Int64s) -> Int32s:
    """Items of equal length stay in their order."""
    sorted_items: Int32s = items.take((-kv_tokens).argsort(kind="stable"), axis=0)
    return sorted_items


def _ragged(count: Int64s) -> tuple[Int64s, Int64s]:
    """For each of `count[i]` things of each i: i, and the thing's number among those of i."""
    owner = np.repeat(np.arange(len(count)), count)
    return owner, np.arange(len(owner)) - (count.cumsum() - count)[owner]


def _columns(*columns: Int64s) -> Int32s:
    """int32 [length, columns], row by row in memory."""
    table: Int32s = np.empty((len(columns[0]), len(columns)), dtype=np.int32)
    for at, column in enumerate(columns):
        table[:, at] = column
    return table
