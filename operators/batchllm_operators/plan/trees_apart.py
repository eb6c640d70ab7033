"""Chooses the trees of the forest that are taken apart for the sake of the order.

The groups below one top-level prefix stand together, so that this prefix is computed once. That keeps decode-heavy
groups of one tree behind the prefill-heavy groups of a tree before it. A tree is taken apart, and its children are
ordered among all trees, when that is worth more than it costs to compute its prefix again for every child:

- Worth: the decode seconds of its children beyond the tree's mean ratio move forward in the order. At best they hide
  under prefill outside the tree. `HIDDEN_SHARE` of the lesser of the two counts as gained.
- Price: the prefill seconds of the prefix for every child but one. The trees with the best ratio of worth to price are
  taken apart first, while the price of all of them together stays below `SAVING_AT_STAKE` of what the plan saves.

A prefix that is a group's own is never taken apart.
"""

from __future__ import annotations

import numpy as np

from batchllm_operators.columns.arrays import Bools, Floats
from batchllm_operators.plan.first_level import FirstLevel
from batchllm_operators.plan.prefix_forest import PrefixForest

HIDDEN_SHARE = 0.1
"""Share of the decode seconds that move forward which is counted as hidden under prefill."""
SAVING_AT_STAKE = 0.0005
"""Share of the tokens that the plan saves which may be computed again."""


def trees_to_take_apart(
    forest: PrefixForest,
    first_level: FirstLevel,
    node_decode: Floats,
    node_tokens: Floats,
    *,
    block_size: int,
    prefill_per_token: float,
    saved_tokens: int,
) -> Bools:
    """The top-level prefixes whose children are ordered on their own.

    Args:
        forest: the shared prefixes.
        first_level: the groups.
        node_decode: float64 [nodes], decode seconds below each node.
        node_tokens: float64 [nodes], prompt tokens to compute below each node, without what its parent computes.
        block_size: tokens of a block.
        prefill_per_token: seconds of one computed prompt token.
        saved_tokens: tokens that the plan saves when no tree is taken apart.

    Returns:
        bool [nodes].
    """
    nodes = len(forest.parent)
    parted = np.zeros(nodes, dtype=np.bool_)
    top = (forest.parent < 0) & ~first_level.chosen
    below = np.flatnonzero((forest.parent >= 0) & top[forest.parent])
    if len(below) == 0:
        return parted
    tree = forest.parent[below]
    prefill = node_tokens * prefill_per_token
    ratio = node_decode / np.maximum(prefill, 1e-12)
    excess = np.maximum(node_decode[below] - ratio[tree] * prefill[below], 0)
    forward = np.bincount(tree, weights=excess, minlength=nodes)
    outside = prefill[forest.parent < 0].sum() - prefill
    worth = HIDDEN_SHARE * np.minimum(forward, outside)
    single = forest.leaf_parent[forest.leaf_parent >= 0]
    children = np.bincount(tree, minlength=nodes) + np.bincount(single, minlength=nodes)
    again = np.maximum(children - 1, 0) * forest.depth * np.int64(block_size)
    price = again * prefill_per_token
    bargains = np.flatnonzero(top & (worth > price) & (children > 1))
    bargains = bargains[np.argsort(-worth[bargains] / np.maximum(price[bargains], 1e-12), kind="stable")]
    affordable = np.cumsum(again[bargains]) <= SAVING_AT_STAKE * saved_tokens
    parted[bargains[affordable]] = True
    return parted
