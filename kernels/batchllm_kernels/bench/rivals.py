"""Other implementations of the same attention, as many as are at hand, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch

from batchllm_kernels.bench.flash_attention_3 import SPLITS_BY_HEURISTIC, SPLITS_IN_CUDA_GRAPHS, FlashAttention3
from batchllm_kernels.bench.layered_step import LayeredStep
from batchllm_kernels.bench.timers import LayerCall

FLASH_ATTENTION_3 = "FlashAttention 3, as in vLLM's CUDA graphs"
FLASH_ATTENTION_3_HEURISTIC = "FlashAttention 3, splits by its heuristic"
FLASH_ATTENTION_3_NAMES = (FLASH_ATTENTION_3, FLASH_ATTENTION_3_HEURISTIC)
VLLM_TRITON, VLLM_FLASH = "vLLM unified attention", "vLLM FlashAttention"
STOCK_NAMES = (*FLASH_ATTENTION_3_NAMES, VLLM_TRITON, VLLM_FLASH)
"""vLLM's own attention."""

SDPA = "torch SDPA on a copy for each request"
MAX_DENSE_BYTES = 12 * 10**9


@dataclass(slots=True)
class Rivals:
    """Calls by name, and for each that is missing the reason."""

    calls: dict[str, LayerCall] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def rivals(inputs: LayeredStep, flash_attention_3: FlashAttention3 | str) -> Rivals:
    """All rivals of a step.

    Args:
        inputs: the step.
        flash_attention_3: the library, or why there is none.
    """
    made = Rivals()
    if isinstance(flash_attention_3, str):
        made.skipped[FLASH_ATTENTION_3] = flash_attention_3
    else:
        for name, splits in (
            (FLASH_ATTENTION_3, SPLITS_IN_CUDA_GRAPHS),
            (FLASH_ATTENTION_3_HEURISTIC, SPLITS_BY_HEURISTIC),
        ):
            made.calls[name] = _flash_attention_3(flash_attention_3, inputs, splits)
    dense_bytes = inputs.dense_bytes * inputs.layers
    if dense_bytes <= MAX_DENSE_BYTES:
        made.calls[SDPA] = _dense_attention(inputs)
    else:
        made.skipped[SDPA] = f"copies of {dense_bytes / 1e9:.0f} GB"
    if inputs.device.type == "cuda" and find_spec("vllm"):
        made.calls |= _vllm(inputs)
    else:
        made.skipped["vLLM"] = "not installed" if inputs.device.type == "cuda" else f"no kernel for {inputs.device}"
    return made


def _flash_attention_3(library: FlashAttention3, inputs: LayeredStep, splits: int) -> LayerCall:
    longest = int(inputs.step.seq_lens.max())
    metadata = library.scheduler_metadata(
        inputs.query,
        inputs.caches[0][0],
        inputs.query_start_loc,
        inputs.seq_lens,
        max_query_len=1,
        max_seq_len=longest,
        causal=True,
        splits=splits,
    )

    def call(layer: int) -> torch.Tensor:
        output, _ = library.attend(
            inputs.query,
            *inputs.caches[layer],
            inputs.block_table,
            inputs.query_start_loc,
            inputs.seq_lens,
            max_query_len=1,
            max_seq_len=longest,
            scale=inputs.scale,
            causal=True,
            splits=splits,
            metadata=metadata,
            output=inputs.output,
        )
        return output

    return call


def _dense_attention(inputs: LayeredStep) -> LayerCall:
    """Each request's context copied into a tensor of its own; all requests of a point are as long."""
    length = int(inputs.step.seq_lens[0])
    table = inputs.block_table.long()
    copies = [
        tuple(cache[table].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for cache in caches)
        for caches in inputs.caches
    ]
    query = inputs.query[:, :, None]

    def call(layer: int) -> torch.Tensor:
        keys, values = copies[layer]
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, scale=inputs.scale, enable_gqa=True
        )
        return attended[:, :, 0]

    return call


def _vllm(inputs: LayeredStep) -> dict[str, LayerCall]:
    from batchllm_kernels.bench.stock_attention import flash_attention, unified_attention

    longest = int(inputs.step.seq_lens.max())

    def of(function: Callable[..., torch.Tensor]) -> LayerCall:
        def call(layer: int) -> torch.Tensor:
            return function(
                inputs.query,
                *inputs.caches[layer],
                inputs.block_table,
                inputs.seq_lens,
                inputs.query_start_loc,
                inputs.scale,
                longest,
            )

        return call

    return {VLLM_TRITON: of(unified_attention), VLLM_FLASH: of(flash_attention)}
