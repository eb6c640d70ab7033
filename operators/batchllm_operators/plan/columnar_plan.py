"""Makes the plan of a job from its requests: columns in, columns out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchllm_operators.columns.arrays import Bools, Floats, Int8s, Int32s, Int64s
from batchllm_operators.columns.request_keys import find_keys
from batchllm_operators.cost import forecast
from batchllm_operators.plan.block_size import planned_block_size
from batchllm_operators.plan.bundles import pack_bundles
from batchllm_operators.plan.cache_simulator import number_blocks, simulate_cache
from batchllm_operators.plan.first_level import FirstLevel, choose_first_level
from batchllm_operators.plan.order import EngineOrder, SortedRequests, order_by_ratio
from batchllm_operators.plan.output_lengths import OutputEstimates, estimate_output_tokens
from batchllm_operators.plan.prefix_forest import PrefixForest, build_forest
from batchllm_operators.plan.prefix_order import PrefixOrder, hit_blocks, sort_by_prefix, usable_blocks
from batchllm_operators.plan.requests import RequestColumns, ResultColumns
from batchllm_operators.specs.planning import CostModel, PlanningSpec

BYTES_PER_NUMBER = 4
GIGABYTE = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Sharing:
    """What some requests share, by position of their depth-first order.

    Attributes:
        order: the requests.
        forest: their shared prefixes.
        whole_prompt: bool [N], whether the longest shared prefix is the whole prompt.
        first_level: their groups.
        optimum_tokens: prompt tokens that an ideal cache, which never evicts, computes.
    """

    order: PrefixOrder
    forest: PrefixForest
    whole_prompt: Bools
    first_level: FirstLevel
    optimum_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Requests in the order of dispatch, bundle after bundle, and what is behind it.

    Attributes:
        request: int64 [N], row of the request in the columns of the job.
        offsets: int64 [bundles + 1], where each bundle begins and ends.
        engine: int32 [bundles], the engine each is meant for.
        group: int32 [N], number of the prefix group; groups are numbered as they begin.
        prefix_tokens: int32 [N], tokens of the group's prefix.
        output_tokens: int32 [N], expected output tokens.
        computed_tokens: int64 [N], prompt tokens expected to be computed.
        prefill_seconds: float64 [N].
        decode_seconds: float64 [N].
        estimate_source: int8 [N].
        whole: what all requests of the job share, also those that are done.
        planned: what the planned requests share.
        done_computed_tokens: prompt tokens that were computed for the requests that are done.
        done_requests: how many requests are done.
        parted_trees: how many trees were taken apart (`trees_apart`).
        pilot: whether only a sample is planned.
        stock_computed_tokens: prompt tokens that a stock engine is expected to compute for all rows as given.
    """

    request: Int64s
    offsets: Int64s
    engine: Int32s
    group: Int32s
    prefix_tokens: Int32s
    output_tokens: Int32s
    computed_tokens: Int64s
    prefill_seconds: Floats
    decode_seconds: Floats
    estimate_source: Int8s
    whole: Sharing
    planned: Sharing
    done_computed_tokens: int
    done_requests: int
    parted_trees: int
    pilot: bool
    stock_computed_tokens: int | None


def make_plan(
    requests: RequestColumns,
    done: ResultColumns,
    earlier: ResultColumns,
    planning: PlanningSpec,
    cost: CostModel,
    *,
    engines: int,
    pilot: bool = False,
) -> Plan:
    """Plan the requests that are not done, or a sample of them.

    Args:
        requests: all distinct requests of the job.
        done: what is answered.
        earlier: results of earlier runs of the job, to learn output lengths from.
        planning: the planning part of the job.
        cost: rates of one engine.
        engines: the number of engines that will take bundles.
        pilot: plan only a share of `planning.pilot_fraction`, evenly over the forest; unless output lengths are known
            already from results of this job or of earlier ones.
    """
    block = planned_block_size(planning)
    window = int(planning.memory_gb * GIGABYTE / 4) if requests.hashes.disk is not None else None
    order = sort_by_prefix(requests.hashes, requests.keys, window_bytes=window)
    whole = _sharing(order, requests, block)
    result = find_keys(requests.keys, done.keys)
    estimates = _estimates(whole, requests, done, earlier, result)

    chosen = result < 0
    pilot = pilot and planning.pilot_fraction > 0 and len(done.keys) + len(earlier.keys) == 0
    if pilot:
        chosen = np.zeros(len(chosen), dtype=np.bool_)
        chosen[order.rows[:: max(round(1 / planning.pilot_fraction), 1)]] = True
    planned = whole if chosen.all() else _sharing(order.only(chosen), requests, block)

    rows = planned.order.rows
    prompt_tokens, output_tokens = requests.prompt_tokens[rows], estimates.tokens[rows]
    seconds = forecast(prompt_tokens, output_tokens, cost)
    if planning.order == "input":
        engine = _order_as_given(planned, requests, estimates, block, cost)
    else:
        engine = order_by_ratio(
            planned.forest,
            planned.first_level,
            SortedRequests(
                prompt_tokens,
                planned.order.shared_blocks * np.int64(block),
                output_tokens,
                seconds.decode,
                planned.whole_prompt,
            ),
            block_size=block,
            prefill_per_token=seconds.prefill_per_token,
            policy=planning.order,
        )
    in_order = engine.positions
    computed = prompt_tokens[in_order] - block * hit_blocks(engine.shared_blocks, prompt_tokens[in_order], block)
    bundles = pack_bundles(
        seconds.decode[in_order] + seconds.prefill_per_token * computed,
        engine.shared_blocks,
        engine.tree,
        engines=engines,
        bundle_seconds=60 * planning.bundle_minutes,
    )
    positions = in_order[bundles.places]
    computed_tokens = prompt_tokens[positions] - np.int64(block) * hit_blocks(
        bundles.shared_blocks, prompt_tokens[positions], block
    )
    group, prefix_tokens = _groups(planned, positions, block)
    return Plan(
        request=rows[positions],
        offsets=bundles.offsets,
        engine=bundles.engine,
        group=group,
        prefix_tokens=prefix_tokens,
        output_tokens=output_tokens[positions],
        computed_tokens=computed_tokens,
        prefill_seconds=computed_tokens * seconds.prefill_per_token,
        decode_seconds=seconds.decode[positions],
        estimate_source=estimates.source[rows[positions]],
        whole=whole,
        planned=planned,
        done_computed_tokens=int(done.computed_tokens[result[result >= 0]].sum()),
        done_requests=int((result >= 0).sum()),
        parted_trees=engine.parted_trees,
        pilot=pilot,
        stock_computed_tokens=_stock_computed_tokens(whole, requests, estimates, planning, cost),
    )


def _sharing(order: PrefixOrder, requests: RequestColumns, block_size: int) -> Sharing:
    forest = build_forest(order)
    lengths = requests.prompt_tokens[order.rows]
    # The depth of no node at all is 0: it stands last, where index -1 finds it.
    deepest = np.append(forest.depth, 0)[forest.leaf_parent].astype(np.int64) * block_size
    whole_prompt = (forest.leaf_parent >= 0) & (deepest == lengths)
    saved = block_size * int(hit_blocks(order.shared_blocks, lengths, block_size).sum(dtype=np.int64))
    optimum_tokens = int(lengths.sum(dtype=np.int64)) - saved
    return Sharing(order, forest, whole_prompt, choose_first_level(forest, whole_prompt), optimum_tokens)


def _estimates(
    whole: Sharing, requests: RequestColumns, done: ResultColumns, earlier: ResultColumns, result: Int64s
) -> OutputEstimates:
    """Expected output tokens of all requests of the job."""
    group = np.empty(len(requests.keys), dtype=np.int32)
    group[whole.order.rows] = whole.first_level.node
    same = find_keys(requests.keys, earlier.keys)
    known = np.append(earlier.completion_tokens, -1)[same]
    known = np.where(result >= 0, np.append(done.completion_tokens, -1)[result], known)
    observed = np.concatenate((done.completion_tokens, earlier.completion_tokens))
    return estimate_output_tokens(requests.max_tokens, requests.estimate, group, known, observed)


def _order_as_given(
    sharing: Sharing, requests: RequestColumns, estimates: OutputEstimates, block_size: int, cost: CostModel
) -> EngineOrder:
    """The order of the input rows, and what the cache of a stock engine holds of each."""
    rows = sharing.order.rows
    positions = np.argsort(requests.first_row[rows], kind="stable").astype(np.int64)
    found = _replay_stock(sharing.order, positions, requests, estimates, block_size, cost)
    return EngineOrder(positions, found, np.zeros(len(rows), dtype=np.int32))


def _stock_computed_tokens(
    whole: Sharing, requests: RequestColumns, estimates: OutputEstimates, planning: PlanningSpec, cost: CostModel
) -> int | None:
    """Prompt tokens that a stock engine computes for all rows in their order; None when they are too many to replay."""
    rows = whole.order.rows
    if int(requests.hashes.blocks.sum(dtype=np.int64)) * BYTES_PER_NUMBER > planning.memory_gb * GIGABYTE:
        return None
    position = np.empty(len(rows), dtype=np.int64)
    position[rows] = np.arange(len(rows))
    positions = position[requests.request_of_row]
    block = planned_block_size(planning)
    found = _replay_stock(whole.order, positions, requests, estimates, block, cost)
    return requests.row_tokens - block * int(found.sum(dtype=np.int64))


def _replay_stock(
    order: PrefixOrder,
    positions: Int64s,
    requests: RequestColumns,
    estimates: OutputEstimates,
    block_size: int,
    cost: CostModel,
) -> Int32s:
    """Blocks that a stock engine finds in its cache when it is fed these positions."""
    rows = order.rows
    blocks, lengths = requests.hashes.blocks[rows], requests.prompt_tokens[rows]
    return simulate_cache(
        positions,
        number_blocks(order, blocks),
        usable_blocks(lengths, block_size),
        capacity_blocks=max(cost.kv_capacity_tokens // block_size, 1),
        own_blocks=-(-(lengths + estimates.tokens[rows]) // block_size) - blocks,
        running=cost.max_running_requests,
    )


def _groups(sharing: Sharing, positions: Int64s, block_size: int) -> tuple[Int32s, Int32s]:
    """Group numbers, in the order in which groups begin, and prefix tokens of the requests at some positions."""
    node = sharing.first_level.node[positions]
    label = np.where(node >= 0, node, len(sharing.forest.parent) + positions)
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int32)
    number[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    depth = np.append(sharing.forest.depth, 0)[node]
    return number[inverse], (depth * block_size).astype(np.int32)
