"""vLLM's own attention kernels on a paged cache, as the benchmark calls them: steps of decoding requests alone.

Nothing here waits for the device, so that the calls can be captured in CUDA graphs.
"""

from __future__ import annotations

import torch


def unified_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    max_seq_len: int,
) -> torch.Tensor:
    """vLLM's Triton kernel, one program for each request and KV head; shapes as in `api.prefix_shared_attention`."""
    from vllm.v1.attention.ops import triton_unified_attention

    output = torch.empty_like(query)
    triton_unified_attention.unified_attention(
        q=query,
        k=key_cache,
        v=value_cache,
        out=output,
        cu_seqlens_q=query_start_loc,
        max_seqlen_q=1,
        seqused_k=seq_lens,
        max_seqlen_k=max_seq_len,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1),
        block_table=block_table,
        softcap=0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
    )
    return output


def flash_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    max_seq_len: int,
) -> torch.Tensor:
    """The FlashAttention that vLLM ships; shapes as in `api.prefix_shared_attention`."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q=query,
        k=key_cache,
        v=value_cache,
        max_seqlen_q=1,
        cu_seqlens_q=query_start_loc,
        max_seqlen_k=max_seq_len,
        seqused_k=seq_lens,
        softmax_scale=scale,
        causal=True,
        block_table=block_table,
    )
