"""What the decode rows of a step move and compute, with sharing and without, as their work plan tells it."""

from __future__ import annotations

import numpy as np

from batchllm_kernels.arrays import Int32s
from batchllm_kernels.attention.cost import KernelCalibration, ModelHeads, StepWork, Traffic
from batchllm_kernels.attention.work_plan import DIRECT, Merge, Node, OwnItem, SharedItem, WorkPlan


def step_work(plan: WorkPlan, seq_lens: Int32s, heads: ModelHeads, device: KernelCalibration) -> StepWork:
    """Traffic of one layer on both paths.

    What the plan leaves unshared although rows have it in common counts as read from memory, on both paths.

    Args:
        plan: of the step.
        seq_lens: int32 [D], as in `plan_work`.
        heads: of this rank.
        device: the size of its second-level cache, and how many programs it runs at once, are used.
    """
    tokens = int(np.count_nonzero(seq_lens))
    direct = int((plan.own_items[:, OwnItem.OUT_SLOT] == DIRECT).sum())
    merged = _span(plan.merges, Merge.FIRST_SLOT, Merge.END_SLOT)
    taken_in = _span(plan.own_items, OwnItem.FIRST_SLOT, OwnItem.END_SLOT)
    own = Traffic(
        plan.own_kv_tokens_read * heads.kv_token_bytes
        + (len(plan.own_items) + direct) * heads.query_token_bytes
        + (taken_in + merged) * heads.partial_bytes  # read of the shared runs, written of split own parts
    )
    merge = None
    if len(plan.merges):
        merge = Traffic(merged * heads.partial_bytes + len(plan.merges) * heads.query_token_bytes)
    once = first_read_tokens(plan, seq_lens, heads, device)
    again = int(seq_lens.sum(dtype=np.int64)) - once
    stock = Traffic(once * heads.kv_token_bytes + 2 * tokens * heads.query_token_bytes, again * heads.kv_token_bytes)
    return StepWork(stock, _shared_launch(plan, heads), own, merge)


def first_read_tokens(plan: WorkPlan, seq_lens: Int32s, heads: ModelHeads, device: KernelCalibration) -> int:
    """KV tokens that come from memory when every row reads its own context, in the order of the batch.

    A row finds a run of blocks in the second-level cache when its programs run beside those of the member before it,
    or when what is read in between fits the cache. Between two members that are further apart it is counted as read
    from memory again.

    Args:
        plan: of the step; what it shares is what may be found.
        seq_lens: int32 [D], as in `plan_work`.
        heads: of this rank.
        device: as in `step_work`.
    """
    own = plan.own_items
    own_tokens = np.bincount(
        own[:, OwnItem.TOKEN], weights=own[:, OwnItem.KV_END] - own[:, OwnItem.KV_START], minlength=len(seq_lens)
    )
    found = int(own_tokens.sum())
    if not len(plan.nodes):
        return found
    run_tokens = (plan.nodes[:, Node.KV_END] - plan.nodes[:, Node.KV_START]).astype(np.int64)
    start = plan.node_row_start
    members = np.arange(len(plan.nodes)).repeat(start[1:] - start[:-1]) * len(seq_lens) + plan.shared_rows[:, 0]
    members.sort()  # by node, then by row
    node, row = np.divmod(members, len(seq_lens))
    further = np.zeros(len(members), dtype=np.bool_)
    further[1:] = node[1:] == node[:-1]
    gap = np.zeros_like(members)  # rows since the member before of the same node
    gap[1:] = members[1:] - members[:-1]
    gap *= further
    apart = gap >= max(device.processors // heads.kv_heads, 1)
    if apart.any():
        entered = np.where(gap == 1, 0, run_tokens[node])  # a run that the row before does not have
        fresh = own_tokens + np.bincount(row, weights=entered, minlength=len(seq_lens))
        until = np.concatenate(([0.0], fresh.cumsum()))  # tokens that the rows before each row bring along
        before = row - gap
        between = until[row] - until[np.minimum(before + 1, row)] + own_tokens[before] + run_tokens[node]
        apart &= between * heads.kv_token_bytes > device.l2_bytes
    return found + int(run_tokens.sum()) + int(run_tokens[node[apart]].sum())


def _shared_launch(plan: WorkPlan, heads: ModelHeads) -> Traffic | None:
    if not len(plan.nodes):
        return None
    read = plan.shared_kv_tokens_read
    written = plan.shared_queries_read  # each split of a row writes a partial result
    queries = int(np.count_nonzero(np.bincount(plan.shared_rows[:, 0])))
    return Traffic(
        first_bytes=plan.shared_tokens * heads.kv_token_bytes
        + written * heads.partial_bytes
        + queries * heads.query_token_bytes,
        # tiles of one run read the same keys side by side; queries are read once for each item
        again_bytes=(read - plan.shared_tokens) * heads.kv_token_bytes + (written - queries) * heads.query_token_bytes,
        flops=4 * heads.head_size * heads.kv_heads * _tile_rows_times_keys(plan, heads),
    )


def _tile_rows_times_keys(plan: WorkPlan, heads: ModelHeads) -> int:
    """Rows times keys of all shared items, with padding: an item takes the lower tile, of half the rows, if it can."""
    items = plan.shared_items
    rows = items[:, SharedItem.ROW_COUNT] * (heads.heads // heads.kv_heads)
    padded = np.where(2 * rows <= plan.shared_tile_rows, plan.shared_tile_rows // 2, plan.shared_tile_rows)
    keys = items[:, SharedItem.KV_END] - items[:, SharedItem.KV_START]
    return int((padded.astype(np.int64) * keys).sum())


def _span(columns: Int32s, first: int, end: int) -> int:
    """Sum of the lengths of ranges that stand in two columns."""
    return int((columns[:, end].astype(np.int64) - columns[:, first]).sum())
