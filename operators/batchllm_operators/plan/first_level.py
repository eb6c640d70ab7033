"""First-level prefixes: the paper's dynamic programme over the prefix forest (BatchLLM, section 4.2).

Every request belongs to one group, and every group has one prefix, computed once. A group of k requests with a prefix
of d blocks saves d (k - 1) blocks. The programme chooses the prefixes that save most; deeper sharing is left to the
depth-first order.

Choosing a prefix costs its d blocks and gives d blocks to each request whose longest chosen prefix it is, so what a
subtree saves depends on the rest of the forest through one number only: the depth of the nearest chosen prefix above.
Each node is valued once for each of its possible nearest chosen prefixes, its ancestors; all of that together is at
most the number of shared blocks in the forest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchllm_operators.columns.arrays import Bools, Int32s, Int64s
from batchllm_operators.columns.compiled import compiled
from batchllm_operators.plan.prefix_forest import PrefixForest


@dataclass(frozen=True, slots=True)
class FirstLevel:
    """The chosen prefixes.

    Attributes:
        node: int32 [N], the prefix of each position's group; -1 for a request that is a group of its own.
        chosen: bool [nodes], whether a node is the prefix of a group.
        saved_blocks: blocks not computed when only these prefixes are shared.
    """

    node: Int32s
    chosen: Bools
    saved_blocks: int


def choose_first_level(forest: PrefixForest, whole_prompt: Bools) -> FirstLevel:
    """Choose the prefixes that save most when every request shares one prefix at the most.

    Args:
        forest: the shared prefixes.
        whole_prompt: bool [N], whether the longest shared prefix of a position is its whole prompt. Such a request
            computes its last block in any case, so it best leads its group, and a second one saves a block less.
    """
    nodes = len(forest.parent)
    shared = forest.leaf_parent >= 0
    requests = np.bincount(forest.leaf_parent[shared], minlength=nodes)
    whole = np.bincount(forest.leaf_parent[shared & whole_prompt], minlength=nodes)
    chosen, node_group, saved = _choose(forest.parent, forest.depth, forest.height, requests, whole)
    group = np.full(len(forest.leaf_parent), -1, dtype=np.int32)
    group[shared] = node_group[forest.leaf_parent[shared]]
    return FirstLevel(group, chosen, int(saved))


@compiled
def _choose(
    parent: Int32s, depth: Int32s, height: Int32s, requests: Int64s, whole: Int64s
) -> tuple[Bools, Int32s, int]:
    nodes = len(parent)
    tallest = 0
    for node in range(nodes):
        tallest = max(tallest, height[node])
    # saved[h, j]: what the open node of height h saves so far, when its nearest chosen prefix is j - 1 nodes from the
    # root (0: none, h + 1: the node itself). In reverse pre-order one node of each height is open at a time.
    saved = np.zeros((tallest + 1, tallest + 2), dtype=np.int64)
    path_depth = np.zeros(tallest + 2, dtype=np.int64)
    chosen_below = np.empty(nodes, dtype=np.int32)
    total = 0
    for node in range(nodes - 1, -1, -1):
        level = height[node]
        above = node
        for place in range(level + 1, 0, -1):
            path_depth[place] = depth[above]
            above = parent[above]
        row = saved[level]
        for place in range(level + 2):
            row[place] += requests[node] * path_depth[place]
        if_chosen = row[level + 1] - max(0, whole[node] - 1) - depth[node]
        places = 0
        for place in range(level + 1):
            if if_chosen > row[place]:
                places = place + 1
            if level > 0:
                saved[level - 1, place] += max(if_chosen, row[place])
        if level == 0:
            total += max(if_chosen, row[0])
        chosen_below[node] = places
        row[: level + 2] = 0
    chosen = np.zeros(nodes, dtype=np.bool_)
    group = np.empty(nodes, dtype=np.int32)
    nearest = np.zeros(nodes, dtype=np.int32)
    for node in range(nodes):
        above = parent[node]
        place = nearest[above] if above >= 0 else 0
        chosen[node] = place < chosen_below[node]
        nearest[node] = height[node] + 1 if chosen[node] else place
        group[node] = node if chosen[node] else (group[above] if above >= 0 else -1)
    return chosen, group, total
