"""What the interface refuses, by name, with what it expected and what it got."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from batchllm_kernels.attention.api import plan_shape, prefix_shared_attention
from batchllm_kernels.attention.plan_buffers import PlanBuffers, PlanCapacity
from batchllm_kernels.attention.tuning import own_tile_rows, tuning_for

from .batches import Request, Step, Tensors, tensors

STEP = Step([Request(own_tokens=20, shares=(("prefix", 3),)) for _ in range(4)])


def call(numbers: Tensors, **changes: object) -> torch.Tensor:
    plan = PlanBuffers.of_plan(STEP.plan(tensors(STEP).shape()), 4, 64, torch.device("cpu"))
    return prefix_shared_attention(
        *numbers.rows, **{"scale": 0.1, "plan": plan, "impl": "reference", **changes}  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl": "flash"}, "impl: expected 'triton' or 'reference', got 'flash'"),
        ({"output": torch.empty(1, 4, 64)}, "output: expected (4, 4, 64), got (1, 4, 64)"),
        ({"output": torch.empty(4, 4, 64, dtype=torch.half)}, "output: expected torch.float32, got torch.float16"),
    ],
)
def test_options_that_are_not_supported_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(tensors(STEP), **changes)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda t: t[0], "query: expected [tokens, heads, head_size], got [4, 64]"),
        ("query", lambda t: t.double(), "query: expected one of torch.float32, torch.float16, torch.bfloat16"),
        ("query", lambda t: t[:, :3], "plan: expected buffers for heads and head size [3, 64], got [4, 64]"),
        ("query", lambda t: t.mT.contiguous().mT, "query: expected stride 1 along its last dimension, got 4"),
        ("key_cache", lambda t: t[..., :32], "key_cache: expected [blocks, block_size, kv_heads, 64], got"),
        (
            "key_cache",
            lambda t: t.to(torch.float8_e4m3fn),
            "key_cache: expected torch.float32, got torch.float8_e4m3fn",
        ),
        ("key_cache", lambda t: t.expand(-1, -1, 3, -1), "heads: expected a multiple of 3 KV heads, got 4"),
        ("value_cache", lambda t: t[1:], "value_cache: expected"),
        ("value_cache", lambda t: t.half(), "value_cache: expected torch.float32, got torch.float16"),
        ("block_table", lambda t: t.long(), "block_table: expected torch.int32, got torch.int64"),
        ("block_table", lambda t: t[0], "block_table: expected [tokens, max_blocks], got [6]"),
        ("block_table", lambda t: t[:2], "block_table: expected (4, 6), got (2, 6)"),
        ("block_table", lambda t: t.to("meta"), "block_table: expected cpu, got meta"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, change: object, message: str) -> None:
    numbers = tensors(STEP)
    numbers = replace(numbers, **{name: change(getattr(numbers, name))})  # type: ignore[operator]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(numbers)


def test_plans_of_another_shape_are_refused() -> None:
    numbers = tensors(STEP)
    of_other_blocks = Step(STEP.requests, block_size=32)
    other = PlanBuffers.of_plan(of_other_blocks.plan(tensors(of_other_blocks).shape()), 4, 64, torch.device("cpu"))
    with pytest.raises(ValueError, match="plan: expected one for blocks of 16 tokens, got 32"):
        call(numbers, plan=other)
    with pytest.raises(ValueError, match="plan: expected buffers with a plan loaded"):
        call(numbers, plan=PlanBuffers(PlanCapacity(1, 1, 1, 1, 1), 4, 64, torch.device("cpu")))
    with pytest.raises(ValueError, match="plan: expected buffers for heads and head size"):
        call(numbers, plan=PlanBuffers.of_plan(STEP.plan(numbers.shape()), 8, 64, torch.device("cpu")))
    with pytest.raises(ValueError, match="plan: expected at most 2 query tokens, got 4"):
        call(replace(numbers, query=numbers.query[:2]))
    with pytest.raises(ValueError, match="plan: expected tiles of 32 rows"):
        plan = STEP.plan(replace(numbers.shape(), shared_tile_rows=128))
        call(numbers, plan=PlanBuffers.of_plan(plan, 4, 64, torch.device("cpu")), impl="triton")


def test_shapes_of_models_that_are_not_supported_are_refused() -> None:
    model = {"block_size": 16, "heads": 8, "kv_heads": 2, "head_size": 128, "dtype": torch.bfloat16}
    device = torch.device("cpu")
    assert plan_shape(**model, device=device).queries_per_kv_head == 4  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="heads: expected a multiple of 3 KV heads, got 8"):
        plan_shape(**{**model, "kv_heads": 3}, device=device)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_size: expected a multiple of 16 tokens, got 24"):
        plan_shape(**{**model, "block_size": 24}, device=device)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="head_size: expected 1 to 256, got 576"):
        plan_shape(**{**model, "head_size": 576}, device=device)  # type: ignore[arg-type]


def test_tiles_grow_with_the_query_heads_of_a_kv_head() -> None:
    tuning = tuning_for("sm90", 128, torch.bfloat16)
    assert tuning.with_room_for(71).shared.low_tile_rows == 128
    assert tuning.with_room_for(200).shared.high_tile_rows == 256
    assert own_tile_rows(71) == 128
    assert tuning.with_room_for(71).own.num_warps == 8
    assert own_tile_rows(4) == 16
    assert tuning.with_room_for(4) == tuning


@pytest.mark.parametrize(("block_size", "tile"), [(16, 16), (32, 32), (48, 16), (64, 32), (128, 32)])
def test_a_tile_of_an_own_part_lies_in_one_block(block_size: int, tile: int) -> None:
    assert tuning_for("sm90", 128, torch.bfloat16).own.kv_tile_tokens(block_size) == tile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_every_supported_head_size_has_launch_parameters(head_size: int, dtype: torch.dtype) -> None:
    tuning = tuning_for("sm123", head_size, dtype)
    assert tuning.shared.kv_tile_tokens >= 16
    assert tuning.own.most_kv_tile_tokens >= 16


def test_a_head_size_beyond_the_table_has_none() -> None:
    with pytest.raises(ValueError, match="head_size: expected at most 256, got 257"):
        tuning_for("sm90", 257, torch.bfloat16)
