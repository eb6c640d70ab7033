"""The forest of shared prefixes, and the choice of one prefix for every request."""

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm_operators.plan.first_level import choose_first_level
from batchllm_operators.plan.prefix_forest import PrefixForest, build_forest
from batchllm_operators.plan.prefix_order import PrefixOrder
from tests.plan.test_prefix_order import sort_prompts

PROMPTS = st.lists(st.lists(st.integers(0, 1), max_size=6), max_size=6)
BLOCK = 2


def forest_of(prompts: list[list[int]], block_size: int = BLOCK) -> tuple[PrefixOrder, PrefixForest, np.ndarray]:
    order = sort_prompts(prompts, block_size)
    forest = build_forest(order)
    whole = [
        node >= 0 and forest.depth[node] * block_size == len(prompts[row])
        for node, row in zip(forest.leaf_parent, order.rows, strict=True)
    ]
    return order, forest, np.array(whole, dtype=np.bool_)


def saved_blocks(prompts: list[list[int]], prefix_of: list[tuple[int, ...]]) -> int:
    """Blocks saved when each prompt shares the prefix that is given for it."""
    saved = 0
    for prefix in set(prefix_of):
        group = [prompt for prompt, chosen in zip(prompts, prefix_of, strict=True) if chosen == prefix]
        # The last token is always computed: a prompt that is only the prefix leads, or computes its last block again.
        again = max(0, sum(len(prompt) == len(prefix) for prompt in group) - 1)
        saved += len(prefix) // BLOCK * (len(group) - 1) - (again if prefix else 0)
    return saved


@settings(max_examples=150)
@given(PROMPTS)
def test_the_chosen_prefixes_save_as_much_as_the_best_of_all_choices(prompts: list[list[int]]) -> None:
    order, forest, whole = forest_of(prompts)
    chosen = choose_first_level(forest, whole)
    prefixes = [[tuple(prompt[:end]) for end in range(0, len(prompt) + 1, BLOCK)] for prompt in prompts]
    best = max(saved_blocks(prompts, list(choice)) for choice in product(*prefixes))
    assert chosen.saved_blocks == best
    depth = np.append(forest.depth, 0)[chosen.node] * BLOCK
    ours = [()] * len(prompts)
    for row, end in zip(order.rows, depth, strict=True):
        ours[row] = tuple(prompts[row][:end])
    assert saved_blocks(prompts, ours) == best


@given(PROMPTS)
def test_the_forest_holds_every_prefix_at_which_requests_part(prompts: list[list[int]]) -> None:
    order, forest, _ = forest_of(prompts)
    ordered = [prompts[row] for row in order.rows]
    nodes = {
        tuple(ordered[first][: depth * BLOCK]): (first, leaves)
        for first, depth, leaves in zip(forest.first, forest.depth, forest.leaves, strict=True)
    }
    assert len(nodes) == len(forest.parent)
    for node, parent in enumerate(forest.parent):
        assert parent < node
        if parent >= 0:
            assert forest.depth[parent] < forest.depth[node]
            assert forest.height[node] == forest.height[parent] + 1
    for prefix, (first, leaves) in nodes.items():
        having = [place for place, prompt in enumerate(ordered) if tuple(prompt[: len(prefix)]) == prefix]
        assert having == list(range(first, first + leaves))
        assert len(having) > 1


def test_a_pair_deep_in_a_large_group_may_be_worth_a_prefix_of_its_own() -> None:
    shallow = [[1, 1, 9, number] for number in range(10)]
    deep = [[1, 1] + [5] * 20 + [number, 0] for number in range(2)]
    _, forest, whole = forest_of(shallow + deep)
    chosen = choose_first_level(forest, whole)
    assert sorted(forest.depth[chosen.chosen].tolist()) == [1, 11]
    assert chosen.saved_blocks == 9 * 1 + 1 * 11


def test_a_short_common_beginning_is_given_up_for_longer_ones() -> None:
    prompts = [[7, 7] + [group] * 40 + [member, 0] for group in range(5) for member in range(4)]
    _, forest, whole = forest_of(prompts)
    chosen = choose_first_level(forest, whole)
    assert set(forest.depth[chosen.node].tolist()) == {21}


def test_a_long_chain_of_ever_longer_prompts_is_no_problem() -> None:
    prompts = [[1] * (2 * length) for length in range(1, 400)]
    _, forest, whole = forest_of(prompts)
    chosen = choose_first_level(forest, whole)
    assert 0 < chosen.saved_blocks < sum(len(prompt) // BLOCK for prompt in prompts)
