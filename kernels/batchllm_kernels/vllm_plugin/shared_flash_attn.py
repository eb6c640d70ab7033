"""Prefix-shared attention on top of vLLM's FlashAttention backend."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from batchllm_kernels.vllm_plugin.attention_backend import (
    SharedAttentionBackend,
    SharedAttentionImpl,
    SharedMetadataBuilder,
)


class SharedBuilder(SharedMetadataBuilder, FlashAttentionMetadataBuilder):  # type: ignore[misc]  # mypy does not follow vLLM
    """Metadata of FlashAttention, with a plan."""


class SharedImpl(SharedAttentionImpl, FlashAttentionImpl):  # type: ignore[misc]  # mypy does not follow vLLM
    """FlashAttention, or the plan."""


class SharedBackend(SharedAttentionBackend, FlashAttentionBackend):  # type: ignore[misc]  # mypy does not follow vLLM
    """What vLLM's registry names."""

    impl_cls = SharedImpl
    builder_cls = SharedBuilder
