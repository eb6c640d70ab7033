"""The launches around FlashAttention 3, and it, for the shared parts of a layer."""

from __future__ import annotations

from typing import Any

import torch
import triton

from batchllm_kernels.attention.flash_kernels import copy_blocks_kernel
from batchllm_kernels.attention.flash_shared import FlashShared
from batchllm_kernels.attention.tuning import multiprocessors

COPY_TILE = 256  # blocks
COPY_WARPS = 4
GATHER_HEAD_TILE = 8
GATHER_WARPS = 4
GATHERS_PER_MULTIPROCESSOR = 16


def copy_blocks(block_table: torch.Tensor, flash: FlashShared) -> None:
    """Copies the blocks of the sequences of the plan last uploaded out of the block table of all requests.

    Args:
        block_table: int32 [requests, max_blocks], on the device.
        flash: whose `sources` and `seq_lens` say which.
    """
    copy_blocks_kernel[(flash.bounds.sequences,)](
        block_table,
        flash.sources,
        flash.seq_lens,
        flash.block_table,
        block_table.stride(0),
        flash.block_table.stride(0),
        BLOCK_SIZE=flash.settings.shape.block_size,
        TILE=COPY_TILE,
        num_warps=COPY_WARPS,
    )


class FlashSharedLaunch:
    """Gathers the queries of all sequences, and attends: one layer, for queries of one shape and strides.

    Args:
        query: [tokens, heads, head_size]; what is kept of it are shape and strides.
        scale: factor of the scores before the softmax.
        flash: tables and scratch space.
        gather: starts the kernel, a `launch.Launcher`.
    """

    def __init__(self, query: torch.Tensor, scale: float, flash: FlashShared, gather: Any) -> None:
        _, heads, head_size = query.shape
        self._flash = flash
        self._scale = scale
        self._gather = gather
        self._numbers = (heads, query.stride(0), query.stride(1), *gather_constants(head_size))
        self._head_tiles = triton.cdiv(heads, GATHER_HEAD_TILE)
        self._programs = GATHERS_PER_MULTIPROCESSOR * multiprocessors(query.device)

    def run(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        counts: torch.Tensor,
        *,
        aligned: bool,
    ) -> torch.Tensor:
        """Writes `FlashShared.results`; returns fp32 [heads, rows], natural logarithms of the sums of exponentials."""
        flash = self._flash
        grid = (min(flash.bounds.rows * self._head_tiles, self._programs), 1, 1)
        self._gather(grid, (query, flash.tokens, counts, flash.queries, *self._numbers), aligned)
        return flash.attend(key_cache, value_cache, self._scale)


def gather_constants(head_size: int) -> tuple[int, int, int]:
    """Compile-time constants of the kernel that gathers queries, in the order of its parameters."""
    return head_size, triton.next_power_of_2(head_size), GATHER_HEAD_TILE
