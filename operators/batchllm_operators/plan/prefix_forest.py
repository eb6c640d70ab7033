"""All shared prefixes of a job as a forest of columns.

A node is a prefix that at least two requests share and at which they part; it covers a range of positions of the
depth-first order. All depths are in full KV blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchllm_operators.columns.arrays import Int32s
from batchllm_operators.columns.compiled import compiled
from batchllm_operators.plan.prefix_order import PrefixOrder


@dataclass(frozen=True, slots=True)
class PrefixForest:
    """Shared prefixes as columns, in pre-order: a parent stands before its children.

    Attributes:
        parent: int32 [nodes], the next shorter shared prefix; -1 at a root.
        depth: int32 [nodes], blocks of the prefix from the start of the prompt.
        height: int32 [nodes], nodes above.
        first: int32 [nodes], first position that has the prefix.
        leaves: int32 [nodes], number of positions that have it.
        leaf_parent: int32 [N], the longest shared prefix of each position; -1 where nothing is shared.
    """

    parent: Int32s
    depth: Int32s
    height: Int32s
    first: Int32s
    leaves: Int32s
    leaf_parent: Int32s


def build_forest(order: PrefixOrder) -> PrefixForest:
    """The forest of the shared prefixes of an order; linear in the positions, but for one sort of the nodes."""
    first, end, depth = _prefix_ranges(order.shared_blocks)
    pre_order = np.lexsort((depth, first))
    first, end, depth = first[pre_order], end[pre_order], depth[pre_order]
    parent, height, leaf_parent = _parents(first, end, len(order.rows))
    return PrefixForest(parent, depth, height, first, end - first, leaf_parent)


@compiled
def _prefix_ranges(shared: Int32s) -> tuple[Int32s, Int32s, Int32s]:
    """Every prefix shared by neighbours, as (first, end, depth), in the order the ranges close."""
    count = len(shared)
    first = np.empty(count, dtype=np.int32)
    end = np.empty(count, dtype=np.int32)
    depth = np.empty(count, dtype=np.int32)
    open_first = np.empty(count + 1, dtype=np.int32)
    open_depth = np.empty(count + 1, dtype=np.int32)
    opened = closed = 0
    for position in range(1, count + 1):
        level = shared[position] if position < count else 0
        start = position - 1
        while opened > 0 and open_depth[opened - 1] > level:
            opened -= 1
            start = open_first[opened]
            first[closed], end[closed], depth[closed] = start, position, open_depth[opened]
            closed += 1
        if level > 0 and (opened == 0 or open_depth[opened - 1] < level):
            open_first[opened], open_depth[opened] = start, level
            opened += 1
    return first[:closed].copy(), end[:closed].copy(), depth[:closed].copy()


@compiled
def _parents(first: Int32s, end: Int32s, count: int) -> tuple[Int32s, Int32s, Int32s]:
    """Parent and height of each node, and the deepest node of each position."""
    nodes = len(first)
    parent = np.empty(nodes, dtype=np.int32)
    height = np.empty(nodes, dtype=np.int32)
    leaf_parent = np.empty(count, dtype=np.int32)
    path = np.empty(nodes + 1, dtype=np.int32)
    on_path = node = 0
    for position in range(count):
        while on_path > 0 and end[path[on_path - 1]] <= position:
            on_path -= 1
        while node < nodes and first[node] == position:
            parent[node] = path[on_path - 1] if on_path > 0 else -1
            height[node] = on_path
            path[on_path] = node
            on_path += 1
            node += 1
        leaf_parent[position] = path[on_path - 1] if on_path > 0 else -1
    return parent, height, leaf_parent
