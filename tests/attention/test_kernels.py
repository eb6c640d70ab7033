"""The Triton kernels agree with the reference, from poisoned scratch space and output."""

from __future__ import annotations

import pytest
import torch

from batchllm_kernels.attention.plan_buffers import PlanBuffers, PlanCapacity

from .batches import Request, Step, mixed_requests, relative_error, tensors

FLOAT32, FLOAT16, BFLOAT16 = (torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)


def group(degree: int = 5, *, blocks: int = 3, **request: int) -> list[Request]:
    """Requests that share some blocks, each with another number of own tokens."""
    return [Request(own_tokens=3 + 7 * n, shares=(("prefix", blocks),), **request) for n in range(degree)]


@pytest.mark.parametrize(("dtype", "tolerance"), [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("share", [True, False])
def test_decode_with_shared_and_own_context(
    device: torch.device, dtype: torch.dtype, tolerance: float, share: bool
) -> None:
    step = Step(mixed_requests())
    numbers = tensors(step, heads=8, kv_heads=2, dtype=dtype, device=device)
    plan = step.plan(numbers.shape(target_items=24), share=share)
    assert (plan.shared_tokens > 0) == share
    assert relative_error(numbers.attend(plan, "triton"), numbers.expected()) < tolerance


@pytest.mark.parametrize(("head_size", "dtype", "tolerance"), [
    (64, *FLOAT16), (80, *FLOAT32), (96, *BFLOAT16), (128, *FLOAT32), (128, *BFLOAT16), (256, *FLOAT16),
    (256, *FLOAT32), (8, *FLOAT32), (17, *FLOAT32),
])  # fmt: skip
def test_head_sizes(device: torch.device, head_size: int, dtype: torch.dtype, tolerance: float) -> None:
    step = Step(group())
    numbers = tensors(step, head_size=head_size, dtype=dtype, device=device)
    plan = step.plan(numbers.shape())
    assert plan.shared_tokens
    assert relative_error(numbers.attend(plan, "triton"), numbers.expected()) < tolerance


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 2), (3, 1), (6, 2), (4, 1), (8, 1), (32, 1)])
def test_query_heads_for_each_kv_head(device: torch.device, heads: int, kv_heads: int) -> None:
    step = Step([*group(blocks=6), Request(own_tokens=9)])
    numbers = tensors(step, heads=heads, kv_heads=kv_heads, head_size=16, device=device)
    plan = step.plan(numbers.shape())
    assert relative_error(numbers.attend(plan, "triton"), numbers.expected()) < 1e-5


@pytest.mark.parametrize("block_size", [16, 32, 48, 64])
def test_block_sizes(device: torch.device, block_size: int) -> None:
    step = Step(group(), block_size=block_size)
    numbers = tensors(step, head_size=32, device=device)
    plan = step.plan(numbers.shape())
    assert plan.shared_tokens
    assert relative_error(numbers.attend(plan, "triton"), numbers.expected()) < 1e-5


@pytest.mark.parametrize("own_tokens", [1, 15, 16, 17, 63, 64, 65])
def test_one_request_of_any_length(device: torch.device, own_tokens: int) -> None:
    step = Step([Request(own_tokens=own_tokens)])
    numbers = tensors(step, head_size=16, device=device)
    assert relative_error(numbers.attend(step.plan(numbers.shape()), "triton"), numbers.expected()) < 1e-5


def test_splits_equal_the_whole(device: torch.device) -> None:
    step = Step(group(degree=3, blocks=40))
    numbers = tensors(step, head_size=32, device=device)
    shape = numbers.shape(target_items=1)
    split_shape = numbers.shape(target_items=64)
    whole, split = step.plan(shape), step.plan(split_shape)
    assert split.partials > whole.partials
    assert relative_error(numbers.attend(split, "triton"), numbers.attend(whole, "triton")) < 1e-5


def test_keys_that_dwarf_the_others_do_not_overflow(device: torch.device) -> None:
    step = Step(group())
    numbers = tensors(step, device=device)
    numbers.key_cache.mul_(200.0)
    assert relative_error(numbers.attend(step.plan(numbers.shape()), "triton"), numbers.expected()) < 1e-4


def test_a_cache_with_heads_behind_tokens_is_read_as_well(device: torch.device) -> None:
    step = Step(group())
    numbers = tensors(step, heads=4, kv_heads=2, head_size=32, device=device)
    expected = numbers.expected()
    numbers.key_cache, numbers.value_cache = numbers.key_cache.contiguous(), numbers.value_cache.contiguous()
    assert relative_error(numbers.attend(step.plan(numbers.shape()), "triton"), expected) < 1e-5


def test_buffers_larger_than_the_plan_and_used_again_change_nothing(device: torch.device) -> None:
    """As a captured graph has it: the grid covers the capacity, older plans lie behind the counts."""
    from batchllm_kernels.attention.api import prefix_shared_attention

    buffers = PlanBuffers(PlanCapacity(30, 60, 60, 40, 160), heads=4, head_size=16, device=device)
    for requests in (mixed_requests()[:6], group(), [Request(own_tokens=20)]):
        step = Step(requests)
        numbers = tensors(step, head_size=16, device=device)
        buffers.load(step.plan(numbers.shape(target_items=8)))
        buffers.partials.fill_(torch.nan)
        output = torch.full_like(numbers.query, torch.nan)
        prefix_shared_attention(
            *numbers.rows, scale=numbers.scale, plan=buffers, impl="triton", output=output, every_launch=True
        )
        assert relative_error(output, numbers.expected()) < 1e-5
