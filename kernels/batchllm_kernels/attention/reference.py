"""Paged attention in plain PyTorch, fp32, any device: what the kernels are checked against.

`paged_attention` knows nothing of sharing; `planned_attention` carries out a work plan item by item, as the kernels do.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from batchllm_kernels.attention.work_plan import DIRECT, WorkPlan


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal attention of every request over its own KV cache; fp32 [tokens, heads, head_size].

    Args:
        query: [tokens, heads, head_size]; tokens of one request stand together.
        key_cache, value_cache: [blocks, block_size, kv_heads, head_size].
        block_table: int32 [requests, max_blocks].
        seq_lens: int32 [requests], with the tokens of this step; 0 for padding.
        query_start_loc: int32 [requests + 1], first query token of each request.
        scale: factor of the scores before the softmax.

    Returns:
        NaN for query tokens that no request has, and for those of padding.
    """
    output = torch.full(query.shape, torch.nan, dtype=torch.float32, device=query.device)
    for request, (start, end) in enumerate(pairwise(query_start_loc.tolist())):
        length = int(seq_lens[request])
        if start == end or not length:
            continue
        keys, values = (_gather(cache, block_table[request], 0, length) for cache in (key_cache, value_cache))
        positions = torch.arange(length - (end - start), length, device=query.device)
        seen = torch.arange(length, device=query.device) <= positions[:, None]
        output[start:end], _ = _attend(query[start:end].float(), keys, values, scale, seen)
    return output


def planned_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    plan: WorkPlan,
) -> torch.Tensor:
    """Attention of decode rows by the items of a work plan; fp32 [tokens, heads, head_size].

    Args:
        query: [tokens, heads, head_size], token i is that of row i; more than the plan has are left alone.
        key_cache, value_cache: [blocks, block_size, kv_heads, head_size].
        block_table: int32 [rows, max_blocks].
        scale: factor of the scores before the softmax.
        plan: of `plan_work` on the same block table.

    Returns:
        NaN for padding rows and for tokens that the plan does not have.
    """
    tokens, heads, head_size = query.shape
    output = torch.full((tokens, heads, head_size), torch.nan, dtype=torch.float32, device=query.device)
    partials = torch.full((plan.partials, heads, head_size), torch.nan, dtype=torch.float32, device=query.device)
    lses = torch.full((plan.partials, heads), torch.nan, dtype=torch.float32, device=query.device)

    for row_start, row_count, request, kv_start, kv_end, split in plan.shared_items.tolist():
        rows = torch.from_numpy(plan.shared_rows[row_start : row_start + row_count]).to(query.device).long()
        token, slot = rows[:, 0], rows[:, 1] + split
        keys, values = (_gather(cache, block_table[request], kv_start, kv_end) for cache in (key_cache, value_cache))
        partials[slot], lses[slot] = _attend(query[token].float(), keys, values, scale)

    for token, kv_start, kv_end, first, end, out_slot in plan.own_items.tolist():
        keys, values = (_gather(cache, block_table[token], kv_start, kv_end) for cache in (key_cache, value_cache))
        own, own_lse = _attend(query[token : token + 1].float(), keys, values, scale)
        result, lse = merge_partials(torch.cat([partials[first:end], own]), torch.cat([lses[first:end], own_lse]))
        if out_slot == DIRECT:
            output[token] = result
        else:
            partials[out_slot], lses[out_slot] = result, lse

    for token, first, end in plan.merges.tolist():
        output[token], _ = merge_partials(partials[first:end], lses[first:end])
    return output


def merge_partials(partials: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One attention result of results over disjoint keys, and its log of the sum of exponentials.

    Args:
        partials: [parts, heads, head_size], softmax-normalised over their own keys.
        lses: [parts, heads], natural logarithm of the sum of exponentials; minus infinity for a part without keys.
    """
    weights = torch.softmax(lses, dim=0)
    merged = (weights[..., None] * torch.where(weights[..., None] > 0, partials, 0.0)).sum(dim=0)
    return merged, torch.logsumexp(lses, dim=0)


def _gather(cache: torch.Tensor, blocks: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """fp32 [end - start, kv_heads, head_size]: tokens of one request out of the paged cache."""
    positions = torch.arange(start, end, device=cache.device)
    block_size = cache.shape[1]
    return cache[blocks[positions // block_size].long(), positions % block_size].float()


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, seen: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over some keys, with the log of the sum of exponentials, [tokens, heads].

    query: [tokens, heads, head_size]; keys, values: [kv, kv_heads, head_size]; seen: bool [tokens, kv], the keys that
    each token sees, at least one; None for all.
    """
    group = query.shape[1] // keys.shape[1]
    keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in (keys, values))
    scores = torch.einsum("qhd,khd->qhk", query, keys) * scale
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    return torch.einsum("qhk,khd->qhd", weights, values), torch.logsumexp(scores, dim=-1)
