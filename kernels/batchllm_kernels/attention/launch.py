"""Launches of the Triton kernels over a plan that lies on the device."""

from __future__ import annotations

import math

import torch
import triton

from batchllm_kernels.attention.plan_buffers import PlanBuffers
from batchllm_kernels.attention.triton_kernels import INTERPRETED, attend_items_kernel, merge_partials_kernel
from batchllm_kernels.attention.tuning import Tuning

MERGE_HEAD_TILE = 4
MERGE_WARPS = 4


def launch_planned_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    buffers: PlanBuffers,
    tuning: Tuning,
    output: torch.Tensor,
) -> None:
    """Writes `output` in two launches: all work items, then the merge. Shapes as in `api.prefix_shared_attention`.

    Raises:
        ValueError: on a device other than CUDA, unless Triton interprets.
    """
    if query.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"impl: expected a CUDA device for 'triton' (or TRITON_INTERPRET=1 before Triton is imported), "
            f"got {query.device}"
        )
    _, heads, head_size = query.shape
    block_size, kv_heads = key_cache.shape[1], key_cache.shape[2]
    items, merges = buffers.grid
    padded = triton.next_power_of_2(head_size)
    if items:
        attend_items_kernel[(items * kv_heads,)](
            query,
            key_cache,
            value_cache,
            block_table,
            seq_lens,
            query_start_loc,
            buffers.items,
            buffers.rows,
            buffers.counts,
            output,
            buffers.partials,
            buffers.lses,
            scale * math.log2(math.e),
            heads,
            kv_heads,
            query.stride(0),
            query.stride(1),
            key_cache.stride(0),
            key_cache.stride(1),
            key_cache.stride(2),
            value_cache.stride(0),
            value_cache.stride(1),
            value_cache.stride(2),
            block_table.stride(0),
            output.stride(0),
            output.stride(1),
            HEADS_PER_KV=heads // kv_heads,
            HEAD_SIZE=head_size,
            HEAD_PADDED=padded,
            BLOCK_SIZE=block_size,
            NARROW_ROWS=tuning.narrow_tile_rows,
            WIDE_ROWS=tuning.wide_tile_rows,
            KV_TILE=tuning.kv_tile_tokens,
            DOT_PRECISION=dot_precision(query.dtype),
            DOT_IN_FP32=INTERPRETED and query.dtype == torch.bfloat16,
            num_warps=tuning.num_warps,
            num_stages=tuning.num_stages,
            enable_fp_fusion=True,
        )
    if merges:
        merge_partials_kernel[(merges, triton.cdiv(heads, MERGE_HEAD_TILE))](
            buffers.partials,
            buffers.lses,
            buffers.merges,
            buffers.counts,
            output,
            heads,
            output.stride(0),
            output.stride(1),
            HEAD_SIZE=head_size,
            HEAD_PADDED=padded,
            HEAD_TILE=MERGE_HEAD_TILE,
            num_warps=MERGE_WARPS,
            enable_fp_fusion=True,
        )


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of products: fp32 inputs must not be rounded to TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"
