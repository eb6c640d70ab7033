"""The order in which an engine takes the requests.

The requests of every shared prefix stand one after the other, so that an engine computes the prefix once and needs it
only while it takes them. The order of siblings, the children of one prefix, may be chosen at every level of the forest:

- First stand the requests that are nothing but the shared prefix: they compute it without a token of their own.
- Single requests follow, longest expected output first, so that no long request is left to run alone at the end.
- Longer prefixes come last, by decreasing ratio of decode to prefill, so that decode tokens mix with later prefill.
  Prefixes that are part of the same group stand before prefixes that begin a group of their own.

At the top, single requests and whole trees are sorted by that ratio together, with two exceptions. Single requests are
dealt out: requests that begin together should not end together and leave the cache empty at once. The last trees and
requests are sorted by their longest expected output, so that the job does not end with a few long completions that
began late. `trees_apart` chooses the trees that are taken apart first, their children ordered among all trees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from batchllm_operators.columns.arrays import Bools, Floats, Int8s, Int32s, Int64s
from batchllm_operators.columns.compiled import compiled
from batchllm_operators.plan.first_level import FirstLevel
from batchllm_operators.plan.prefix_forest import PrefixForest
from batchllm_operators.plan.trees_apart import trees_to_take_apart

_WHOLE_PROMPT, _REQUEST, _SAME_GROUP, _SUBTREE = range(4)
"""Kinds of siblings, in their order."""
_FEW_SIBLINGS = 24
"""Up to so many siblings are sorted by insertion, which is faster for them."""

DEALT_SHARE = 2 / 3
"""Share of the single requests at the top that is dealt out: those with most decode; the others stand behind them."""
ROUNDS = 3
"""Single requests are dealt out in so many rounds: with three, every third request stands in the first round."""
TAIL_SHARE = 0.125
"""Share of all work that stands last, sorted by the longest expected output."""


@dataclass(frozen=True, slots=True)
class SortedRequests:
    """Columns of the requests at the positions of the depth-first order.

    Attributes:
        prompt_tokens: int32 [N].
        shared_tokens: int64 [N], tokens of the full blocks shared with the position before.
        output_tokens: int32 [N], expected output tokens.
        decode_seconds: float64 [N], what each completion costs an engine.
        whole_prompt: bool [N], whether the longest shared prefix is the whole prompt.
    """

    prompt_tokens: Int32s
    shared_tokens: Int64s
    output_tokens: Int32s
    decode_seconds: Floats
    whole_prompt: Bools


@dataclass(frozen=True, slots=True)
class EngineOrder:
    """Requests in the order an engine takes them.

    Attributes:
        positions: int64 [N], positions of the depth-first order.
        shared_blocks: int32 [N], full blocks shared with the request before.
        tree: int32 [N], number of the top-level tree that each request is in; a single request is a tree too. The
            numbers increase.
        parted_trees: how many trees were taken apart.
    """

    positions: Int64s
    shared_blocks: Int32s
    tree: Int32s
    parted_trees: int = 0


def order_by_ratio(
    forest: PrefixForest,
    first_level: FirstLevel,
    requests: SortedRequests,
    *,
    block_size: int,
    prefill_per_token: float,
    policy: Literal["decode_first", "blend"],
) -> EngineOrder:
    """Order siblings by decreasing decode/prefill ratio, or blend both ends of that list.

    Args:
        forest: the shared prefixes.
        first_level: the groups.
        requests: what each request costs.
        block_size: tokens of a block.
        prefill_per_token: seconds of one computed prompt token.
        policy: `blend` takes siblings from both ends of the sorted list, so that at any time the ratio of what has
            been taken is near that of all: compute-heavy and memory-heavy work run together (BlendServe).
    """
    nodes, count = len(forest.parent), len(forest.leaf_parent)
    top = nodes + count
    parent = np.concatenate((forest.parent, forest.leaf_parent)).astype(np.int64)
    parent[parent < 0] = top
    depth = np.zeros(top + 1, dtype=np.int32)
    depth[:nodes] = forest.depth
    decode, tokens = _work_of_subtrees(forest, requests, depth[parent] * np.int64(block_size))
    parted = trees_to_take_apart(
        forest,
        first_level,
        decode[:nodes],
        tokens[:nodes],
        block_size=block_size,
        prefill_per_token=prefill_per_token,
        saved_tokens=int(requests.shared_tokens.sum()),
    )
    if parted.any():
        parent[np.append(parted, np.zeros(count + 1, dtype=np.bool_))[parent]] = top
        decode, tokens = _work_of_subtrees(forest, requests, depth[parent] * np.int64(block_size))

    kind = np.full(top, _SUBTREE, dtype=np.int8)
    inner = parent != top
    kind[:nodes][~first_level.chosen] = _SAME_GROUP
    kind[nodes:] = np.where(requests.whole_prompt, _WHOLE_PROMPT, _REQUEST)
    kind[~inner] = _SUBTREE
    rank = decode / tokens
    rank[nodes:] = np.where(inner[nodes:], requests.output_tokens, rank[nodes:])

    children, offsets = _children(parent, forest.first, count)
    _sort_siblings(children, offsets, kind, rank)
    trees = children[offsets[top] :]
    if policy == "blend":
        _blend_siblings(children, offsets, kind, decode, tokens)
    else:
        _deal_singles(trees, nodes)
    _sort_tail(trees, decode + tokens * prefill_per_token, forest, requests.output_tokens)
    positions, shared, tree = _walk(children, offsets, depth, nodes, count)
    return EngineOrder(positions, shared, tree, int(parted.sum()))


def _work_of_subtrees(forest: PrefixForest, requests: SortedRequests, above: Int64s) -> tuple[Floats, Floats]:
    """Decode seconds and computed prompt tokens of every node, then of every position.

    Args:
        forest: the shared prefixes.
        requests: what each request costs.
        above: int64 [nodes + N], tokens of the prefix above each node and each position, which are not counted.
    """
    nodes = len(forest.parent)
    first, end = forest.first, forest.first + forest.leaves
    own = np.concatenate(([0], np.cumsum(requests.prompt_tokens - requests.shared_tokens)))
    decode = np.concatenate(([0.0], np.cumsum(requests.decode_seconds)))
    node_tokens = own[end] - own[first] + requests.shared_tokens[first] - above[:nodes]
    request_tokens = requests.prompt_tokens - above[nodes:]
    tokens = np.maximum(np.concatenate((node_tokens, request_tokens)), 1).astype(np.float64)
    return np.concatenate((decode[end] - decode[first], requests.decode_seconds)), tokens


@compiled
def _children(parent: Int64s, first: Int32s, count: int) -> tuple[Int64s, Int64s]:
    """Nodes and requests by parent, in depth-first order, and where the children of each node begin."""
    items = len(parent)
    nodes = items - count
    offsets = np.zeros(items + 2, dtype=np.int64)
    for item in range(items):
        offsets[parent[item] + 1] += 1
    for item in range(items + 1):
        offsets[item + 1] += offsets[item]
    place = offsets[:-1].copy()
    children = np.empty(items, dtype=np.int64)
    node = 0
    for position in range(count):
        while node < nodes and first[node] == position:
            children[place[parent[node]]] = node
            place[parent[node]] += 1
            node += 1
        item = nodes + position
        children[place[parent[item]]] = item
        place[parent[item]] += 1
    return children, offsets


@compiled
def _sort_siblings(children: Int64s, offsets: Int64s, kind: Int8s, rank: Floats) -> None:
    """Sort siblings by kind, then by decreasing rank; equal ones keep their order."""
    for node in range(len(offsets) - 1):
        low, high = offsets[node], offsets[node + 1]
        if high - low > _FEW_SIBLINGS:
            siblings = children[low:high]
            siblings = siblings[np.argsort(-rank[siblings], kind="mergesort")]
            children[low:high] = siblings[np.argsort(kind[siblings], kind="mergesort")]
            continue
        for position in range(low + 1, high):
            item = children[position]
            place = position
            while place > low:
                other = children[place - 1]
                if kind[other] < kind[item] or (kind[other] == kind[item] and rank[other] >= rank[item]):
                    break
                children[place] = other
                place -= 1
            children[place] = item


@compiled
def _blend_siblings(children: Int64s, offsets: Int64s, kind: Int8s, decode: Floats, prefill: Floats) -> None:
    """Take siblings of a kind from the front while decode so far is short of its share, else from the back."""
    for node in range(len(offsets) - 1):
        low, end = offsets[node], offsets[node + 1]
        while low < end:
            high = low
            all_decode = all_prefill = 0.0
            while high < end and kind[children[high]] == kind[children[low]]:
                all_decode += decode[children[high]]
                all_prefill += prefill[children[high]]
                high += 1
            if kind[children[low]] >= _SAME_GROUP and high - low > 2:
                siblings = children[low:high].copy()
                front, back = 0, high - low - 1
                taken_decode = taken_prefill = 0.0
                for position in range(low, high):
                    if taken_decode * all_prefill <= all_decode * taken_prefill:
                        item = siblings[front]
                        front += 1
                    else:
                        item = siblings[back]
                        back -= 1
                    children[position] = item
                    taken_decode += decode[item]
                    taken_prefill += prefill[item]
            low = high


def _deal_singles(trees: Int64s, nodes: int) -> None:
    """Deal out the first single requests among the places that single requests have."""
    places = np.flatnonzero(trees >= nodes)
    places = places[: int(DEALT_SHARE * len(places))]
    singles = trees[places]
    trees[places] = np.concatenate([singles[start::ROUNDS] for start in range(ROUNDS)])


def _sort_tail(trees: Int64s, work: Floats, forest: PrefixForest, output_tokens: Int32s) -> None:
    """Sort the last of these trees, with `TAIL_SHARE` of their work, by decreasing longest expected output."""
    if len(trees) == 0:
        return
    until_end = np.cumsum(work[trees[::-1]])
    tail = trees[-1 - int(np.searchsorted(until_end, TAIL_SHARE * until_end[-1])) :]
    longest = _longest_outputs(tail, forest.first, forest.leaves, output_tokens)
    tail[:] = tail[np.argsort(-longest, kind="stable")]


@compiled
def _longest_outputs(trees: Int64s, first: Int32s, leaves: Int32s, output_tokens: Int32s) -> Int64s:
    """The longest expected output of each tree, or single request."""
    longest = np.zeros(len(trees), dtype=np.int64)
    for number, tree in enumerate(trees):
        if tree >= len(first):
            longest[number] = output_tokens[tree - len(first)]
            continue
        for position in range(first[tree], first[tree] + leaves[tree]):
            longest[number] = max(longest[number], output_tokens[position])
    return longest


@compiled
def _walk(children: Int64s, offsets: Int64s, depth: Int32s, nodes: int, count: int) -> tuple[Int64s, Int32s, Int32s]:
    """The requests depth-first, with the blocks that each shares with the request before, and its top-level tree."""
    positions = np.empty(count, dtype=np.int64)
    shared = np.empty(count, dtype=np.int32)
    tree = np.empty(count, dtype=np.int32)
    next_child = offsets[:-1].copy()
    path = np.empty(nodes + 1, dtype=np.int64)
    path[0] = len(offsets) - 2
    on_path, done, trees, common = 1, 0, -1, 0
    while on_path > 0:
        node = path[on_path - 1]
        if next_child[node] == offsets[node + 1]:
            on_path -= 1
            if on_path > 0:
                common = depth[path[on_path - 1]]
            continue
        item = children[next_child[node]]
        next_child[node] += 1
        if on_path == 1:
            trees += 1
        if item < nodes:
            path[on_path] = item
            on_path += 1
            continue
        positions[done] = item - nodes
        shared[done] = common
        tree[done] = trees
        common = depth[node]
        done += 1
    return positions, shared, tree
