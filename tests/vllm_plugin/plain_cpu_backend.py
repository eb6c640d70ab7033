"""The plugin's attention over `CPU_ATTN`, for tests: a plain KV layout, and the reference where Triton cannot run.

vLLM's CPU kernels pack the keys, so that the stock half of this backend is the reference without sharing.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from batchllm_kernels.attention.cost import KernelCalibration
from batchllm_kernels.attention.reference import paged_attention
from batchllm_kernels.vllm_plugin.attention_backend import (
    SharedAttentionBackend,
    SharedAttentionImpl,
    SharedMetadataBuilder,
)
from tests.vllm_plugin.calibrations import free_launches
from tests.vllm_plugin.recorded_graph import launch

REFERENCE_VARIABLE = "TEST_REFERENCE_ATTENTION"
"""Environment variable that asks for the reference where Triton could run too."""


class PlainImpl(CPUAttentionBackendImpl):
    def do_kv_cache_update(  # vLLM's signature, as below
        self, _layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        slots = slot_mapping.clamp(min=0)  # padding goes to vLLM's null block, so that shapes do not depend on it
        block, offset = slots // keys.shape[1], slots % keys.shape[1]
        keys[block, offset] = key[: len(slots)]
        values[block, offset] = value[: len(slots)]

    def forward(
        self, _layer: Any, query: Any, _key: Any, _value: Any, kv_cache: Any, attn_metadata: Any, output: Any, *_: Any
    ) -> torch.Tensor:
        if attn_metadata is None:
            return output
        rows = attn_metadata.decode_rows
        assert rows is None or rows.prompts, "a step of decode rows with a plan came to the stock path"
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        lengths = attn_metadata.block_table, attn_metadata.seq_lens, attn_metadata.query_start_loc
        tokens = int(attn_metadata.query_start_loc[-1])
        output[:tokens] = paged_attention(query[:tokens], keys, values, *lengths, self.scale).to(output.dtype)
        return output


class SharedImpl(SharedAttentionImpl, PlainImpl):
    implementation = "triton" if HAS_TRITON and REFERENCE_VARIABLE not in os.environ else "reference"

    def attend_decode_rows(self, *arguments: Any) -> None:
        if self.implementation == "triton":
            super().attend_decode_rows(*arguments)
        else:
            launch(super().attend_decode_rows, *arguments)


class SharedBuilder(SharedMetadataBuilder, CPUAttentionMetadataBuilder):
    @staticmethod
    def calibration(_shared_impl: str) -> KernelCalibration:
        return free_launches("test: any gain, and any loss", minimum_gain=-1e9)


class SharedBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[SharedImpl]:
        return SharedImpl

    @staticmethod
    def get_builder_cls() -> type[SharedBuilder]:
        return SharedBuilder


class SharedOverCpu(SharedAttentionBackend, CPUAttentionBackend):
    """As `CUSTOM`, with the plugin's own answers to what it supports."""

    impl_cls = SharedImpl
    builder_cls = SharedBuilder
