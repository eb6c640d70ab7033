"""Prefix-shared attention as vLLM's attention backend `CUSTOM`, on top of the stock backend of the device.

A step that the cost gate does not take runs the stock backend's own code. The block table is looked at once per step,
for all layers. Tensor parallelism: each rank plans alike for its own heads. CUDA graphs: attention runs between the
captured pieces (vLLM's PIECEWISE mode, chosen by itself), because a captured step could not change paths; the mode
FULL, in which vLLM would fail, is refused before the start.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers

from batchllm_kernels.attention.api import DTYPES, MAX_HEAD_SIZE, Implementation, prefix_shared_attention
from batchllm_kernels.attention.cost import Calibration, ModelHeads, calibration_for
from batchllm_kernels.attention.plan_buffers import PlanBuffers
from batchllm_kernels.attention.step_planner import StepLimits, StepPlanner
from batchllm_kernels.vllm_plugin import STOCK_BACKENDS
from batchllm_kernels.vllm_plugin.attention_refusals import record
from batchllm_kernels.vllm_plugin.attention_trace import AttentionTraceWriter
from batchllm_kernels.vllm_plugin.block_table_mirror import rows_of_step
from batchllm_kernels.vllm_plugin.options import ATTENTION_TRACE_VARIABLE
from batchllm_kernels.vllm_plugin.runner_tables import keep_host_tables

_KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")


def register(stock: str = "FLASH_ATTN") -> None:
    """Makes `attention_backend="CUSTOM"` mean prefix-shared attention on top of a stock backend.

    Args:
        stock: vLLM's name of the backend that runs what the cost gate leaves alone.

    Raises:
        ValueError: for another stock backend than those of `STOCK_BACKENDS`.
    """
    if stock not in STOCK_BACKENDS:
        raise ValueError(f"stock: expected one of {', '.join(STOCK_BACKENDS)}, got {stock!r}")
    register_backend(AttentionBackendEnum.CUSTOM, STOCK_BACKENDS[stock])


class SharedAttentionBackend:
    """Mixin before a stock backend class: what prefix sharing leaves of its features.

    vLLM asks these at start, and refuses a model with the reasons, which are recorded for who started the engine.
    """

    impl_cls: ClassVar[type[Any]]
    """Attention of one layer: `SharedAttentionImpl` before the stock implementation."""
    builder_cls: ClassVar[type[Any]]
    """Metadata of one step: `SharedMetadataBuilder` before the stock builder."""
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's registry."""
        return "CUSTOM"

    @classmethod
    def get_impl_cls(cls) -> type[Any]:
        """vLLM asks for it by this name."""
        return cls.impl_cls

    @classmethod
    def get_builder_cls(cls) -> type[Any]:
        """vLLM asks for it by this name."""
        return cls.builder_cls

    @classmethod
    def validate_configuration(cls, *args: Any, **options: Any) -> list[str]:
        """vLLM's reasons not to use this backend for a layer; none: it may."""
        reasons: list[str] = super().validate_configuration(*args, **options)  # type: ignore[misc]  # the stock class has it
        for reason in reasons:
            record(reason)
        return reasons

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Both the kernels and the stock backend must."""
        return head_size <= MAX_HEAD_SIZE and super().supports_head_size(head_size)  # type: ignore[misc]  # the stock class has it

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        """Both the kernels and the stock backend must."""
        return dtype in DTYPES and super().supports_dtype(dtype)  # type: ignore[misc]  # the stock class has it

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """No quantised caches."""
        return kv_cache_dtype is None or kv_cache_dtype in cls.supported_kv_cache_dtypes

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders only."""
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def _not_supported(cls) -> bool:
        return False

    supports_sliding_window = supports_sink = supports_mm_prefix = supports_alibi_sqrt = _not_supported
    supports_non_causal = supports_rswa = supports_per_head_quant_scales = _not_supported
    supports_batch_invariance = supports_device_cpu_query_lens_mismatch = supports_pcp = supports_dcp = _not_supported


class SharedMetadataBuilder:
    """Mixin before a stock metadata builder: adds the step's plan to its metadata, as `prefix_shared_plan`."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    supports_update_block_table: bool = False  # a plan belongs to one block table
    supports_draft_decode_metadata_update: bool = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        if vllm_config.speculative_config is not None:
            raise _refusal("speculative_config: expected None, prefix-shared attention does not support drafts")
        try:
            keep_host_tables(vllm_config)
        except ValueError as error:
            record(str(error))
            raise
        self._block_size = kv_cache_spec.block_size
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]  # the stock class has it
        heads = get_num_attention_heads_from_layers(vllm_config, layer_names)
        self._planner = StepPlanner(
            ModelHeads(
                heads or vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config),
                kv_cache_spec.num_kv_heads,
                kv_cache_spec.head_size,
                kv_cache_spec.dtype.itemsize,
            ),
            kv_cache_spec.block_size,
            kv_cache_spec.dtype,
            StepLimits(vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.scheduler_config.max_num_seqs),
            self.calibration(),
            device,
        )
        trace = os.environ.get(ATTENTION_TRACE_VARIABLE)
        self._trace = AttentionTraceWriter(Path(trace), vllm_config.parallel_config.rank) if trace else None

    @classmethod
    def get_cudagraph_support(cls, _vllm_config: Any, _kv_cache_spec: Any) -> AttentionCGSupport:
        """Attention is never captured."""
        return cls._cudagraph_support

    @staticmethod
    def calibration() -> Calibration:
        """Of the device that runs the engine."""
        return calibration_for(current_platform.get_device_name())

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The stock metadata, with a plan where sharing pays."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]  # the stock class has it
        metadata.prefix_shared_plan = decision = None
        if common_attn_metadata.causal is True and common_attn_metadata.num_reqs > 1:
            longest = common_attn_metadata.max_seq_len
            block_table = rows_of_step(common_attn_metadata, -(-longest // self._block_size))
            if block_table is not None:
                metadata.prefix_shared_plan = self._planner.plan(
                    block_table,
                    common_attn_metadata.seq_lens_cpu_upper_bound,  # exact without drafts
                    common_attn_metadata.query_start_loc_cpu,
                    longest,
                )
                decision = self._planner.decision
        if self._trace is not None:
            self._trace.write(
                requests=common_attn_metadata.num_reqs,
                query_tokens=common_attn_metadata.num_actual_tokens,
                decision=decision,
            )
        return metadata


class SharedAttentionImpl:
    """Mixin before a stock implementation: runs the step's plan where there is one."""

    implementation: ClassVar[Implementation] = "triton"
    supports_pcp: bool = False
    supports_dcp: bool = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name, expected in (
            ("alibi_slopes", (None,)),
            ("sliding_window", (None, -1, (-1, -1))),
            ("logits_soft_cap", (None, 0)),
            ("sinks", (None,)),
            ("kv_cache_dtype", _KV_CACHE_DTYPES),
            ("attn_type", (AttentionType.DECODER,)),
        ):
            value = getattr(self, name, expected[0])
            if isinstance(value, torch.Tensor) or value not in expected:
                raise _refusal(f"{name}: expected one of {expected} for prefix-shared attention, got {value}")

    def fused_output_quant_supported(self, _quant_key: Any) -> bool:
        """vLLM must not fuse the quantisation of the output into attention, as it does with the Triton backend."""
        return False

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one layer; shapes as in vLLM's `AttentionImpl.forward`, keys and values being in the cache."""
        plan: PlanBuffers | None = getattr(attn_metadata, "prefix_shared_plan", None)
        if plan is None or plan.plan is None:
            stock = super().forward  # type: ignore[misc]  # the stock class has it
            result: torch.Tensor = stock(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
            return result
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("output_scale: expected None, prefix-shared attention does not quantise its output")
        tokens = plan.plan.query_tokens
        keys, values = kv_cache.transpose(1, 2).split(query.shape[-1], dim=-1)
        prefix_shared_attention(
            query[:tokens],
            keys,
            values,
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            scale=self.scale,  # type: ignore[attr-defined]  # the stock class has it
            plan=plan,
            impl=self.implementation,
            output=output[:tokens],
        )
        return output


def _refusal(reason: str) -> ValueError:
    record(reason)
    return ValueError(reason)
