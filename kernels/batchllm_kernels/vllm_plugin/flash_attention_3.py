"""FlashAttention 3 as vLLM has it, for the shared parts of steps: whether it is to be had, and its calls."""

from __future__ import annotations

import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides

from batchllm_kernels.attention.flash_shared import SharedImplementationChoice, choose_shared_implementation

VERSION = 3


class VllmFlashAttention3:
    """`attention.flash_shared.VarlenAttention` by vLLM's own functions."""

    def scheduler_metadata(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        max_query_len: int,
        max_seq_len: int,
        causal: bool,
        splits: int,
    ) -> torch.Tensor:
        """How the work of a step is divided."""
        from vllm.vllm_flash_attn import get_scheduler_metadata

        metadata: torch.Tensor = get_scheduler_metadata(
            batch_size=len(seq_lens),
            max_seqlen_q=max_query_len,
            max_seqlen_k=max_seq_len,
            num_heads_q=query.shape[1],
            num_heads_kv=key_cache.shape[2],
            headdim=query.shape[2],
            cache_seqlens=seq_lens,
            qkv_dtype=query.dtype,
            cu_seqlens_q=query_start_loc,
            page_size=key_cache.shape[1],
            causal=causal,
            num_splits=splits,
        )
        return metadata

    def attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        block_table: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        max_query_len: int,
        max_seq_len: int,
        scale: float,
        causal: bool,
        splits: int,
        metadata: torch.Tensor | None,
        output: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, and the natural logarithm of the sum of exponentials, fp32 [heads, tokens]."""
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        result, lses = flash_attn_varlen_func(
            q=query,
            # as vLLM's own backend does: FlashAttention's copies fail on odd strides of dimensions of one
            k=canonicalize_singleton_dim_strides(key_cache),
            v=canonicalize_singleton_dim_strides(value_cache),
            max_seqlen_q=max_query_len,
            cu_seqlens_q=query_start_loc,
            max_seqlen_k=max_seq_len,
            seqused_k=seq_lens,
            softmax_scale=scale,
            causal=causal,
            block_table=block_table,
            return_softmax_lse=True,
            out=output,
            scheduler_metadata=metadata,
            num_splits=splits,
            fa_version=VERSION,
        )
        return result, lses


def shared_implementation(dtype: torch.dtype, head_size: int) -> SharedImplementationChoice:
    """What runs the shared parts of an engine on this machine; every process of it comes to the same answer.

    Args:
        dtype: of query and cache.
        head_size: numbers of a head.
    """
    capability = current_platform.get_device_capability()
    return choose_shared_implementation(
        compute_capability=capability.major if capability is not None else 0,
        dtype=dtype,
        head_size=head_size,
        missing=_missing(),
    )


def _missing() -> str | None:
    """Why vLLM has no FlashAttention 3 here, None where it has."""
    if not current_platform.is_cuda():
        return f"no FlashAttention 3 for {current_platform.device_name}"
    try:
        from vllm.vllm_flash_attn import fa_version_unsupported_reason
    except ImportError as error:
        return str(error)
    reason: str | None = fa_version_unsupported_reason(VERSION)
    return reason
