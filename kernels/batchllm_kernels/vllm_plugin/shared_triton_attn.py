"""Prefix-shared attention on top of vLLM's Triton backend."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from batchllm_kernels.vllm_plugin.attention_backend import (
    SharedAttentionBackend,
    SharedAttentionImpl,
    SharedMetadataBuilder,
)


class SharedBuilder(SharedMetadataBuilder, TritonAttentionMetadataBuilder):  # type: ignore[misc]  # mypy does not follow vLLM
    """Metadata of the Triton backend, with a plan."""


class SharedImpl(SharedAttentionImpl, TritonAttentionImpl):  # type: ignore[misc]  # mypy does not follow vLLM
    """The stock kernel, or the plan."""


class SharedBackend(SharedAttentionBackend, TritonAttentionBackend):  # type: ignore[misc]  # mypy does not follow vLLM
    """What vLLM's registry names."""

    impl_cls = SharedImpl
    builder_cls = SharedBuilder
