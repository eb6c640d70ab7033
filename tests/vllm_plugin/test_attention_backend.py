"""Prefix-shared attention inside vLLM: what it refuses, and greedy outputs equal to the stock engine's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from batchllm_kernels.vllm_plugin.attention_backend import register
from batchllm_kernels.vllm_plugin.options import ATTENTION_TRACE_VARIABLE
from batchllm_kernels.vllm_plugin.shared_flash_attn import SharedBackend as OverFlashAttention
from batchllm_kernels.vllm_plugin.shared_triton_attn import SharedBackend as OverTriton

REPOSITORY = Path(__file__).parent.parent.parent
LLAMA = {
    "head_size": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": 16,
    "use_mla": False,
    "has_sink": False,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "device_capability": DeviceCapability(9, 0),
    "attn_type": "decoder",
}


@pytest.mark.parametrize("backend", [OverFlashAttention, OverTriton])
def test_a_plain_decoder_is_accepted(backend: Any) -> None:
    assert backend.validate_configuration(**LLAMA) == []


@pytest.mark.parametrize("backend", [OverFlashAttention, OverTriton])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_mla": True}, "MLA not supported"),
        ({"has_sliding_window": True}, "sliding window not supported"),
        ({"has_sink": True}, "attention sinks not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"head_size": 512}, "head_size not supported"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
        ({"use_dcp": True}, "DCP not supported"),
        ({"use_pcp": True}, "PCP not supported"),
        ({"use_adaptive_verification": True}, "device-cpu query lens mismatch not supported"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_reason(backend: Any, change: dict[str, Any], reason: str) -> None:
    reasons = backend.validate_configuration(**{**LLAMA, **change})
    assert any(one.startswith(reason) for one in reasons), reasons


@pytest.mark.parametrize("stock", ["FLASH_ATTN", "TRITON_ATTN"])
def test_the_custom_backend_is_ours_once_registered(stock: str) -> None:
    try:
        register(stock)
        backend = AttentionBackendEnum.CUSTOM.get_class()
        assert backend in (OverFlashAttention, OverTriton)
        assert AttentionBackendEnum[backend.get_name()] is AttentionBackendEnum.CUSTOM
        assert issubclass(backend, AttentionBackendEnum[stock].get_class())
    finally:
        AttentionBackendEnum.CUSTOM.clear_override()


def test_no_other_backend_is_built_upon() -> None:
    with pytest.raises(ValueError, match="stock: expected one of FLASH_ATTN, TRITON_ATTN, got 'FLASHINFER'"):
        register("FLASHINFER")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups under one parent, shuffled, prompts longer than a step's tokens, and one that shares nothing."""
    parent = list(range(1000, 1064))
    members = [[*parent, *range(2000 + 100 * g, 2096 + 100 * g), *range(3000 + 7 * n, 3005 + 8 * n)]
               for n in range(5) for g in range(2)]  # fmt: skip
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps([*members, list(range(5000, 5150))]))
    return path


def outputs(model: str, prompts: Path, attention: str, scheduling: str, trace: Path | None = None) -> list[list[int]]:
    command = [sys.executable, "-m", "tests.vllm_plugin.attention_engine", model, str(prompts), attention, scheduling]
    environment = os.environ | ({ATTENTION_TRACE_VARIABLE: str(trace)} if trace else {})
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, cwd=REPOSITORY, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tokens: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return tokens


@pytest.fixture(scope="module")
def stock_outputs(tiny_llama: str, prompts: Path) -> list[list[int]]:
    return outputs(tiny_llama, prompts, "stock", "async")


@pytest.mark.engine
@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_greedy_outputs_equal_those_of_the_stock_engine(
    tiny_llama: str, prompts: Path, stock_outputs: list[list[int]], scheduling: str, tmp_path: Path
) -> None:
    trace = tmp_path / "attention.jsonl"
    assert outputs(tiny_llama, prompts, "shared", scheduling, trace) == stock_outputs
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    sharing = [step for step in steps if step["share"]]
    assert any(step["query_tokens"] == step["requests"] for step in sharing)  # decode
    assert any(step["query_tokens"] > step["requests"] for step in sharing)  # with chunks of prompts
    assert any(not step["share"] for step in steps)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"sliding_window": 128}, "sliding_window: expected one of"),
        ({"alibi_slopes": [0.5, 0.25]}, "alibi_slopes: expected one of"),
        ({"logits_soft_cap": 30.0}, "logits_soft_cap: expected one of"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: expected one of"),
        ({"attn_type": "encoder_only"}, "attn_type: expected one of"),
    ],
)
def test_layers_that_are_not_supported_are_refused_when_they_are_made(option: dict[str, Any], message: str) -> None:
    plain = {"num_heads": 2, "head_size": 64, "scale": 0.125, "num_kv_heads": 1, "alibi_slopes": None,
             "sliding_window": None, "kv_cache_dtype": "auto"}  # fmt: skip
    made = OverTriton.get_impl_cls()
    assert made(**plain).scale == 0.125
    with pytest.raises(ValueError, match=message):
        made(**{**plain, **option})
