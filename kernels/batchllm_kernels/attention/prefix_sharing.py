"""Which requests of a step read the same leading KV blocks, from the block table alone.

Physical block ids are all that is compared, so no message from the scheduler is needed: a prefix cache hit is two
requests naming one block. The result is the compressed trie of the block-table rows, down to a few levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchllm_kernels.arrays import Int32s, Int64s

MAX_LEVELS = 4  # of the trie that are looked at: a system prompt, a template, a document, and one to spare


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Runs of leading blocks that at least two requests share, as columns; a parent stands before its children.

    Attributes:
        parent: int64 [nodes], the node whose blocks come before; -1 at a root.
        level_start: int64 [levels + 1], nodes of a level are `level_start[l]:level_start[l + 1]`.
        first_block: int64 [nodes], block-table column where the node's run starts.
        end_block: int64 [nodes], column after its last.
        members: int64 [sum of members], requests (rows of the block table) of each node, in batch order.
        member_start: int64 [nodes + 1], offsets into `members`.
    """

    parent: Int64s
    level_start: Int64s
    first_block: Int64s
    end_block: Int64s
    members: Int64s
    member_start: Int64s


def find_shared_prefixes(block_table: Int32s, context_blocks: Int64s, max_levels: int = MAX_LEVELS) -> SharedPrefixes:
    """The shared runs of leading blocks of a step, level by level.

    Args:
        block_table: int32 [R, max_blocks], physical block ids.
        context_blocks: int64 [R], leading blocks of each request that were full before this step; only those can be
            shared, since a query must see every key of a shared block.
        max_levels: levels of the trie to find.

    A pass refines all nodes of a level at once: one sort of the requests by (node, next block), one comparison of
    neighbouring rows. Members of a node agree on every block before `end_block`, and on no longer run.
    """
    found: list[_Level] = []
    members = np.flatnonzero(context_blocks > 0)
    owner = np.full(len(members), -1, dtype=np.int64)
    depth = np.zeros(len(members), dtype=np.int64)
    nodes = 0
    while len(members) > 1 and len(found) < max_levels:
        level = _refine(block_table, context_blocks, members, owner, depth)
        if level is None:
            break
        found.append(level)
        node_of_member = np.repeat(np.arange(len(level.parent)), level.member_count)
        goes_on = context_blocks[level.members] > level.end_block[node_of_member]
        members = level.members[goes_on]
        owner = node_of_member[goes_on] + nodes
        depth = level.end_block[node_of_member][goes_on]
        nodes += len(level.parent)
    return _joined(found)


@dataclass(frozen=True, slots=True)
class _Level:
    parent: Int64s
    first_block: Int64s
    end_block: Int64s
    members: Int64s
    member_count: Int64s


def _refine(
    block_table: Int32s, context_blocks: Int64s, members: Int64s, owner: Int64s, depth: Int64s
) -> _Level | None:
    key = (owner << 32) + block_table[members, depth]
    order = key.argsort(kind="stable")  # members of a node stay in batch order
    key = key[order]
    with_previous = np.zeros(len(key), dtype=bool)
    np.equal(key[1:], key[:-1], out=with_previous[1:])
    in_a_run = with_previous.copy()
    in_a_run[:-1] |= with_previous[1:]
    if not in_a_run.any():
        return None
    members = members[order[in_a_run]]
    first = np.flatnonzero(~with_previous[in_a_run])
    member_count = np.append(first[1:], len(members)) - first
    parents = order[in_a_run][first]
    known = depth[parents]
    limit = np.minimum.reduceat(context_blocks[members], first)
    return _Level(
        parent=owner[parents],
        first_block=known,
        end_block=_common_blocks(block_table, members, first, member_count, known, limit),
        members=members,
        member_count=member_count,
    )


def _common_blocks(
    block_table: Int32s, members: Int64s, first: Int64s, member_count: Int64s, known: Int64s, limit: Int64s
) -> Int64s:
    """int64 [nodes]: leading blocks on which all members of a node agree, at most `limit`; the first `known` are."""
    start, columns = int(known.min()), int(limit.max())
    ends = members[first], members[first + member_count - 1]
    agreed = _equal_columns(*(block_table[rows, start:columns] for rows in ends))
    common = np.minimum(limit, start + agreed)
    crowded = member_count > 2
    if crowded.any():
        columns = int(common[crowded].max())  # two members mostly say it all, and bound the comparison of the others
        node = np.repeat(np.flatnonzero(crowded), member_count[crowded])
        rows = block_table[members[np.repeat(crowded, member_count)], start:columns]
        agreed = _equal_columns(rows[1:], rows[:-1])
        of_one_node = node[1:] == node[:-1]
        np.minimum.at(common, node[1:][of_one_node], start + agreed[of_one_node])
    return common


def _equal_columns(rows: Int32s, others: Int32s) -> Int64s:
    """int64 [rows]: leading columns in which two tables agree."""
    differs = rows != others
    position: Int64s = differs.argmax(axis=1)
    position[(position == 0) & ~differs[:, 0]] = rows.shape[1]
    return position


def _joined(levels: list[_Level]) -> SharedPrefixes:
    empty = np.zeros(0, dtype=np.int64)
    counts = np.concatenate([empty, *(level.member_count for level in levels)])
    return SharedPrefixes(
        parent=np.concatenate([empty, *(level.parent for level in levels)]),
        level_start=np.cumsum([0, *(len(level.parent) for level in levels)], dtype=np.int64),
        first_block=np.concatenate([empty, *(level.first_block for level in levels)]),
        end_block=np.concatenate([empty, *(level.end_block for level in levels)]),
        members=np.concatenate([empty, *(level.members for level in levels)]),
        member_start=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)]),
    )
