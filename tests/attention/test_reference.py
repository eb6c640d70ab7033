"""The reference agrees with PyTorch's attention on dense copies that share nothing."""

from __future__ import annotations

import pytest
import torch

from batchllm_kernels.attention.reference import merge_partials, paged_attention

from .batches import Step, Tensors, mixed_requests, relative_error, tensors


def dense_attention(numbers: Tensors) -> torch.Tensor:
    """`scaled_dot_product_attention` of each request on its own copy of its keys and values."""
    results = []
    block_size = numbers.key_cache.shape[1]
    for request, length in enumerate(numbers.seq_lens.tolist()):
        first, end = numbers.query_start_loc[request : request + 2].tolist()
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


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (4, 1)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_reference_equals_dense_attention(heads: int, kv_heads: int, block_size: int) -> None:
    step = Step(mixed_requests(), block_size=block_size)
    numbers = tensors(step, heads=heads, kv_heads=kv_heads, head_size=24)
    expected = dense_attention(numbers)
    assert relative_error(numbers.expected(), expected) < 1e-5
    assert relative_error(numbers.attend(step.plan(numbers.shape()), "reference"), expected) < 1e-5


def test_partial_results_merge_in_any_order_to_that_of_all_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, values = torch.randn(30, generator=generator), torch.randn(30, 8, generator=generator)
    parts = [(scores[a:b], values[a:b]) for a, b in ((0, 1), (1, 20), (20, 30))]
    partials = torch.stack([(torch.softmax(s, 0)[:, None] * v).sum(0)[None] for s, v in parts])
    lses = torch.stack([torch.logsumexp(s, 0)[None] for s, _ in parts])
    expected = (torch.softmax(scores, 0)[:, None] * values).sum(0)[None]
    for order in ([0, 1, 2], [2, 0, 1]):
        assert relative_error(merge_partials(partials[order], lses[order]), expected) < 1e-5


def test_a_part_without_keys_does_not_count() -> None:
    partials = torch.stack([torch.full((1, 4), torch.nan), torch.ones(1, 4)])
    lses = torch.tensor([[-torch.inf], [0.5]])
    assert merge_partials(partials, lses).tolist() == [[1.0] * 4]


def test_reference_leaves_query_tokens_of_no_request_poisoned() -> None:
    numbers = tensors(Step(mixed_requests()))
    numbers.query = torch.cat([numbers.query, numbers.query[:2]])
    result = paged_attention(*numbers.inputs, numbers.scale)
    assert result[-2:].isnan().all()
    assert not result[:-2].isnan().any()
