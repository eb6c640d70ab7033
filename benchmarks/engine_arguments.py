"""Arguments of vLLM's engine, and the models, that the benchmarks share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

BLOCK_SIZE = 32
"""Tokens of a KV-cache block, of our engine."""
DEFAULT_BLOCK_SIZES = {"cpu": 128, "cuda": 16}
"""Tokens of vLLM's own blocks, by device."""


def engine_arguments(
    *, model: str, dtype: str, device: str, eager: bool, max_model_len: int, cache_tokens: int, block_size: int | None
) -> dict[str, Any]:
    """vLLM's `EngineArgs` for a KV cache of so many tokens; `block_size` None: vLLM's own choice."""
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "enforce_eager": eager,
        # One block more is vLLM's null block.
        "num_gpu_blocks_override": cache_tokens // (block_size or DEFAULT_BLOCK_SIZES[device]) + 1,
    }
    if device == "cpu":
        arguments["kv_cache_memory_bytes"] = 2**30  # else vLLM measures the memory; the override decides
    if block_size:
        arguments["block_size"] = block_size
    return arguments


def models_folder() -> Path:
    """Where the benchmarks' models are kept; made if need be."""
    folder = Path(os.environ.get("BATCHLLM_MODELS", Path(__file__).parent.parent / ".models")).absolute()
    folder.mkdir(exist_ok=True)
    return folder
