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

    Shapes as in `api.prefix_shared_attention`.
    """
    output = torch.full(query.shape, torch.nan, dtype=torch.float32, device=query.device)
    for request, (start, end) in enumerate(pairwise(query_start_loc.tolist())):
        if start == end:
            continue
        length = int(seq_lens[request])
        keys, values = (_gather(cache, block_table[request], 0, length) for cache in (key_cache, value_cache))
        positions = torch.arange(length - (end - start), length, device=query.device)
        output[start:end], _ = _attend(query[start:end].float(), keys, values, positions, 0, scale)
    return output


def planned_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    plan: WorkPlan,
) -> torch.Tensor:
    """Causal attention by the items of a work plan, then the merge of partials; fp32 [tokens, heads, head_size]."""
    tokens, heads, head_size = query.shape
    output = torch.full((tokens, heads, head_size), torch.nan, dtype=torch.float32, device=query.device)
    partials = torch.full((plan.partials, heads, head_size), torch.nan, dtype=torch.float32, device=query.device)
    lses = torch.full((plan.partials, heads), torch.nan, dtype=torch.float32, device=query.device)
    ends = query_start_loc[1:].tolist()
    for row_start, row_count, request, kv_start, kv_end, split, causal, _ in plan.items.tolist():
        rows = torch.from_numpy(plan.rows[row_start : row_start + row_count]).to(query.device).long()
        token, slot = rows[:, 0], rows[:, 1]
        positions = int(seq_lens[request]) - ends[request] + token if causal else torch.full_like(token, kv_end)
        keys, values = (_gather(cache, block_table[request], kv_start, kv_end) for cache in (key_cache, value_cache))
        partial, lse = _attend(query[token].float(), keys, values, positions, kv_start, scale)
        direct = slot == DIRECT
        output[token[direct]] = partial[direct]
        partials[slot[~direct] + split] = partial[~direct]
        lses[slot[~direct] + split] = lse[~direct]
    for token, first, end in plan.merges.tolist():
        output[token] = merge_partials(partials[first:end], lses[first:end])
    return output


def merge_partials(partials: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    """One attention result of results over disjoint keys.

    Args:
        partials: [parts, heads, head_size], softmax-normalised over their own keys.
        lses: [parts, heads], natural logarithm of the sum of exponentials; minus infinity for a part without keys.
    """
    weights = torch.softmax(lses, dim=0)
    return (weights[..., None] * torch.where(weights[..., None] > 0, partials, 0.0)).sum(dim=0)


def _gather(cache: torch.Tensor, blocks: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """fp32 [end - start, kv_heads, head_size]: tokens of one request out of the paged cache."""
    positions = torch.arange(start, end, device=cache.device)
    block_size = cache.shape[1]
    return cache[blocks[positions // block_size].long(), positions % block_size].float()


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, kv_start: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over some keys, with the log of the sum of exponentials.

    query: [tokens, heads, head_size]; keys, values: [kv, kv_heads, head_size]; positions: [tokens], last key position
    that a token sees; kv_start: position of the first key.
    """
    group = query.shape[1] // keys.shape[1]
    keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in (keys, values))
    scores = torch.einsum("qhd,khd->qhk", query, keys) * scale
    seen = kv_start + torch.arange(len(keys), device=query.device) <= positions[:, None]
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    return torch.einsum("qhk,khd->qhd", weights, values), lse
