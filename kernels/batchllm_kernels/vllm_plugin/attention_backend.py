"""Prefix-shared attention as vLLM's attention backend `CUSTOM`, on top of the stock backend of the device.

In a batch, requests with one query token stand first (vLLM's second model runner sorts them so, the first one for our
`reorder_batch_threshold`): the decode rows. They run ours where the cost gate says so; rows of prompts always run the
stock backend's own code, with metadata of its own for just these rows. Where the gate says no, one stock call runs all.

CUDA graphs: a step of decode rows alone can be captured whole (`UNIFORM_SINGLE_TOKEN_DECODE`). Such a graph holds our
launches, which read the plan at fixed addresses with its counts on the device; so `build` loads a plan for every step
that may be a replay, one without sharing where the gate says no. Mixed steps run attention between captured pieces.

Tensor parallelism: each rank plans alike for its own heads.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from vllm.config import CUDAGraphMode, get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers, split_decodes_and_prefills
from vllm.v1.worker.ubatch_utils import UBatchSlice, split_attn_metadata
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from batchllm_kernels.attention.api import DTYPES, MAX_HEAD_SIZE, Implementation, prefix_shared_attention
from batchllm_kernels.attention.cost import Decision, KernelCalibration, Launching, ModelHeads, calibration_for
from batchllm_kernels.attention.flash_shared import SharedImplementation, VarlenAttention
from batchllm_kernels.attention.plan_buffers import Allocate, PlanBuffers
from batchllm_kernels.attention.step_planner import StepPlanner, step_capacity
from batchllm_kernels.vllm_plugin import STOCK_BACKENDS
from batchllm_kernels.vllm_plugin.attention_refusals import record, recording, refusal
from batchllm_kernels.vllm_plugin.attention_trace import AttentionTraceWriter
from batchllm_kernels.vllm_plugin.block_table_mirror import rows_of_step
from batchllm_kernels.vllm_plugin.flash_attention_3 import VllmFlashAttention3, shared_implementation
from batchllm_kernels.vllm_plugin.options import ATTENTION_TRACE_VARIABLE
from batchllm_kernels.vllm_plugin.runner_tables import keep_host_tables

_LOGGER = logging.getLogger(__name__)
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


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """What ours runs of a step: its first requests, which have one query token each.

    Attributes:
        count: requests, and query tokens.
        plan: on the device.
        block_table: int32 [count, max_blocks], on the device.
        prompts: whether other requests follow; the stock metadata is then of these alone.
        every_launch: whether what is launched must do for every plan, as in a graph.
        shared_impl: what runs the shared parts.
    """

    count: int
    plan: PlanBuffers
    block_table: torch.Tensor
    prompts: bool
    every_launch: bool
    shared_impl: SharedImplementation


class SharedMetadataBuilder:
    """Mixin before a stock metadata builder: adds to its metadata what ours runs, as `decode_rows`, or None."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int | None = 1  # one query token or fewer: those requests stand first
    supports_update_block_table: bool = False  # a plan belongs to one block table
    supports_draft_decode_metadata_update: bool = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        if vllm_config.speculative_config is not None:
            raise refusal("speculative_config: expected None, prefix-shared attention does not support drafts")
        recording(keep_host_tables, vllm_config)
        self._block_size = kv_cache_spec.block_size
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]  # the stock class has it
        heads = get_num_attention_heads_from_layers(vllm_config, layer_names)
        if kv_cache_spec.dtype != vllm_config.model_config.dtype:
            raise refusal(
                f"KV cache: expected that of the model, {vllm_config.model_config.dtype}, got {kv_cache_spec.dtype}"
            )
        flash = self.shared_attention(kv_cache_spec.dtype, kv_cache_spec.head_size)
        self._planner = recording(
            StepPlanner,
            ModelHeads(
                heads or vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config),
                kv_cache_spec.num_kv_heads,
                kv_cache_spec.head_size,
                kv_cache_spec.dtype.itemsize,
            ),
            len(layer_names),
            kv_cache_spec.block_size,
            kv_cache_spec.dtype,
            vllm_config.scheduler_config.max_num_seqs,
            self.calibration("triton" if flash is None else "flash_attention_3"),
            device,
            host_hidden=bool(vllm_config.scheduler_config.async_scheduling),
            allocate=workspace(device),
            upload_depth=vllm_config.max_concurrent_batches,
            shared_attention=flash,
            max_blocks=0 if flash is None else -(-vllm_config.model_config.max_model_len // kv_cache_spec.block_size),
        )
        if device.type == "cuda":
            self._planner.compile_kernels()
        self._compilation = vllm_config.compilation_config
        self._capturing = False
        self._decision: Decision | None = None
        trace = os.environ.get(ATTENTION_TRACE_VARIABLE)
        self._trace = AttentionTraceWriter(Path(trace), vllm_config.parallel_config.rank) if trace else None

    @classmethod
    def get_cudagraph_support(cls, _vllm_config: Any, _kv_cache_spec: Any) -> AttentionCGSupport:
        """Steps of one query token a request may be captured whole; the stock builder's own answer does not count."""
        return cls._cudagraph_support

    @staticmethod
    def calibration(shared_impl: SharedImplementation) -> KernelCalibration:
        """The rates of the device that runs the engine, with what runs the shared parts there."""
        return calibration_for(current_platform.get_device_name(), shared_impl)

    @staticmethod
    def shared_attention(dtype: torch.dtype, head_size: int) -> VarlenAttention | None:
        """FlashAttention 3 for the shared parts where the engine has it, None for the Triton kernel."""
        choice = shared_implementation(dtype, head_size)
        _LOGGER.info("shared parts of attention: %s", choice)
        return VllmFlashAttention3() if choice.implementation == "flash_attention_3" else None

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """Metadata of a dummy batch with which `forward` launches ours, as every replay will."""
        self._capturing = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]  # the stock class has it
        finally:
            self._capturing = False

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The stock metadata, of all rows or of those of prompts, and the plan of the decode rows where ours runs."""
        common = common_attn_metadata
        count, prompts = _rows(common)
        rows = self._decode_rows(common, count, prompts)
        stock_rows = _of_prompts(common, count) if rows is not None and prompts else common
        metadata = super().build(common_prefix_len, stock_rows, fast_build)  # type: ignore[misc]  # the stock class has it
        metadata.decode_rows = rows
        if self._trace is not None and not self._capturing:
            self._trace.write(
                requests=common.num_reqs if prompts else count,
                query_tokens=int(common.query_start_loc_cpu[common.num_reqs]),
                decision=self._decision,
            )
        return metadata

    def _decode_rows(self, common: Any, count: int, prompts: bool) -> DecodeRows | None:
        """What ours is to run of a step in which `count` requests stand first with one query token each."""
        lengths = common.seq_lens_cpu_upper_bound[:count].numpy()  # exact without drafts
        longest = common.max_seq_len
        graphs = not prompts and self._compilation.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        # Nothing is shared within a block. vLLM's V1 runner warms up with such steps before a capture: all launches.
        every_launch = self._capturing or (graphs and longest <= self._block_size)
        replayed = graphs and count <= (self._compilation.max_cudagraph_capture_size or 0)
        plan = self._decision = None
        if every_launch:
            plan = self._planner.load_alone(lengths, rows=common.num_reqs)
        elif count > 1:
            block_table = rows_of_step(common, -(-longest // self._block_size))
            if block_table is not None:  # else made up, and no sign of what batches share
                plan = self._planner.plan(
                    block_table[:count],
                    lengths,
                    launching=Launching.CAPTURED if replayed else Launching.PIECES,
                    prefill_rows=prompts,
                    device_table=common.block_table_tensor,
                    rows=common.num_reqs if replayed else None,
                )
                self._decision = self._planner.decision
        if plan is not None:
            table, shared_impl = common.block_table_tensor[:count], self._planner.shared_impl
            return DecodeRows(count, plan, table, prompts, every_launch, shared_impl)
        if replayed:
            # The graph of this step runs ours, whatever the gate says. `forward` from Python takes stock.
            self._planner.load_alone(lengths, rows=common.num_reqs)
        return None


def _rows(common: Any) -> tuple[int, bool]:
    """How many requests stand first with one query token each, and whether others follow; padding does not count."""
    decodes, prompts, *_ = split_decodes_and_prefills(common)
    if prompts:
        return decodes, True
    return int(common.query_start_loc_cpu[common.num_reqs]), False


def _of_prompts(common: Any, first: int) -> Any:
    """vLLM's `CommonAttentionMetadata` of the requests from `first` on, before which each has one query token."""
    rows = UBatchSlice(slice(first, common.num_reqs), slice(first, common.num_actual_tokens))
    return split_attn_metadata([rows], common)[0]


class SharedAttentionImpl:
    """Mixin before a stock implementation: ours for the decode rows where they have a plan, stock for all else."""

    implementation: ClassVar[Implementation] = "triton"
    supports_pcp: bool = False
    supports_dcp: bool = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._config = get_current_vllm_config_or_none()
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
                raise refusal(f"{name}: expected one of {expected} for prefix-shared attention, got {value}")

    def fused_output_quant_supported(self, _quant_key: Any) -> bool:
        """vLLM must not fuse the quantisation of the output into attention, as it does with the Triton backend."""
        return False

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one layer; shapes as in vLLM's `AttentionImpl.forward`, keys and values being in the cache."""
        if attn_metadata is None:
            self._reserve(query)
        rows: DecodeRows | None = getattr(attn_metadata, "decode_rows", None)
        stock = super().forward  # type: ignore[misc]  # the stock class has it
        if rows is None:
            result: torch.Tensor = stock(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
            return result
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("output_scale: expected None, prefix-shared attention does not quantise its output")
        self.attend_decode_rows(query, kv_cache, rows, output)
        if rows.prompts:
            first = rows.count
            # a layer that reads the cache of another has no keys of its own
            keys, values = (None if one is None else one[first:] for one in (key, value))
            stock(layer, query[first:], keys, values, kv_cache, attn_metadata, output[first:])
        return output

    def _reserve(self, query: torch.Tensor) -> None:
        """Allocates the partial results, in the forward pass by which vLLM profiles memory.

        Metadata builders, which hold the plans, are made when the KV cache has got what that pass left over.
        """
        if self._config is None or not is_workspace_manager_initialized():
            return
        _, heads, head_size = query.shape
        scheduler = self._config.scheduler_config
        capacity = step_capacity(
            ModelHeads(heads, self.num_kv_heads, head_size, query.element_size()),  # type: ignore[attr-defined]  # the stock class has it
            self._config.cache_config.block_size,
            query.dtype,
            scheduler.max_num_seqs,
            query.device,
            shared_impl=shared_implementation(query.dtype, head_size).implementation,
        )
        allocate = workspace(query.device)
        for name, shape in capacity.scratch(heads, head_size).items():
            allocate(name, shape)

    def attend_decode_rows(
        self, query: torch.Tensor, kv_cache: torch.Tensor, rows: DecodeRows, output: torch.Tensor
    ) -> None:
        """Ours for the decode rows; shapes as in `forward`. All it does on the device may stand in a CUDA graph."""
        count = rows.count
        keys, values = kv_cache.transpose(1, 2).split(query.shape[-1], dim=-1)
        prefix_shared_attention(
            query[:count],
            keys,
            values,
            rows.block_table,
            scale=self.scale,  # type: ignore[attr-defined]  # the stock class has it
            plan=rows.plan,
            impl=self.implementation,
            shared_impl=rows.shared_impl,
            output=output[:count],
            every_launch=rows.every_launch,
        )


def workspace(device: torch.device) -> Allocate:
    """Scratch space for all layers and steps out of vLLM's workspace: each name and shape is allocated once a worker.

    A worker without one, as that for CPUs, profiles no memory; there it is new each time.
    """

    def allocate(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if not is_workspace_manager_initialized():
            return torch.empty(shape, dtype=torch.float32, device=device)
        found: torch.Tensor = current_workspace_manager().get_persistent((__name__, name, shape), shape, torch.float32)
        return found

    return allocate
