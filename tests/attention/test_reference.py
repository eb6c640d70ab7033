"""The reference agrees with PyTorch's attention on dense copies that share nothing."""

from __future__ import annotations

import pytest
import torch

from batchllm_kernels.attention.reference import merge_partials, paged_attention
from batchllm_kernels.attention.work_plan import WorkPlanShape

from .batches import Request, Step, Tensors, mixed_requests, prompt_requests, relative_error, tensors


def dense_attention(numbers: Tensors) -> torch.Tensor:
    """`scaled_dot_product_attention` of each request on its own copy of its keys and values."""
    results = []
    block_size = numbers.key_cache.shape[1]
    for request, length in enumerate(numbers.seq_lens.tolist()):
        first, end = numbers.query_start_loc[request : request + 2].tolist()
        if not length:
            results.append(torch.full_like(numbers.query[first:end], torch.nan))
            continue
        blocks = numbers.block_table[request, : -(-length // block_size)].long()
        keys, values = (
            cache[blocks].flatten(0, 1)[:length].float().transpose(0, 1)
            for cache in (numbers.key_cache, numbers.value_cache)
        )
        seen = torch.ones(end - first, length, dtype=torch.bool).tril(diagonal=length - (end - first))
        query = numbers.query[first:end].float().transpose(0, 1)
        result = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=seen, scale=numbers.scale, enable_gqa=True
        )
        results.append(result.transpose(0, 1))
    return torch.cat(results)


@pytest.mark.parametrize("requests", [mixed_requests(), prompt_requests()], ids=["decode", "prompts"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (4, 1)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_reference_equals_dense_attention(requests: list[Request], heads: int, kv_heads: int, block_size: int) -> None:
    numbers = tensors(Step(requests, block_size=block_size), heads=heads, kv_heads=kv_heads, head_size=24)
    assert relative_error(numbers.expected(), dense_attention(numbers)) < 1e-5


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (4, 1)])
@pytest.mark.parametrize("target_items", [1, 64])
@pytest.mark.parametrize("share", [True, False])
def test_a_plan_gives_dense_attention(heads: int, kv_heads: int, target_items: int, share: bool) -> None:
    step = Step(mixed_requests())
    numbers = tensors(step, heads=heads, kv_heads=kv_heads, head_size=24)
    shape = WorkPlanShape(
        16, heads // kv_heads, target_items=target_items, own_target_items=target_items, minimum_split_tokens=16
    )
    assert relative_error(numbers.planned(step.plan(shape, share=share)), dense_attention(numbers)) < 1e-5


def test_partial_results_merge_in_any_order_to_that_of_all_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, values = torch.randn(30, generator=generator), torch.randn(30, 8, generator=generator)
    parts = [(scores[a:b], values[a:b]) for a, b in ((0, 1), (1, 20), (20, 30))]
    partials = torch.stack([(torch.softmax(s, 0)[:, None] * v).sum(0)[None] for s, v in parts])
    lses = torch.stack([torch.logsumexp(s, 0)[None] for s, _ in parts])
    expected = (torch.softmax(scores, 0)[:, None] * values).sum(0)[None]
    for order in ([0, 1, 2], [2, 0, 1]):
        merged, lse = merge_partials(partials[order], lses[order])
        assert relative_error(merged, expected) < 1e-5
        assert float(lse) == pytest.approx(float(torch.logsumexp(scores, 0)))


def test_a_part_without_keys_does_not_count() -> None:
    partials = torch.stack([torch.full((1, 4), torch.nan), torch.ones(1, 4)])
    lses = torch.tensor([[-torch.inf], [0.5]])
    merged, lse = merge_partials(partials, lses)
    assert merged.tolist() == [[1.0] * 4]
    assert lse.tolist() == [0.5]


def test_reference_leaves_query_tokens_of_no_request_poisoned() -> None:
    numbers = tensors(Step(prompt_requests()))
    numbers.query = torch.cat([numbers.query, numbers.query[:2]])
    result = paged_attention(*numbers.inputs, numbers.scale)
    assert result[-2:].isnan().all()
    assert not result[:-2].isnan().any()
