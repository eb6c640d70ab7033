"""Launches of the Triton kernels over a plan that lies on the device.

What does not change from layer to layer is prepared once (`PreparedLaunches`): the arguments of every launch but the
addresses of tensors, and the compiled kernels, which are then started without Triton's own look at each argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton

from batchllm_kernels.attention.flash_kernels import gather_queries_kernel
from batchllm_kernels.attention.flash_launch import GATHER_WARPS, FlashSharedLaunch
from batchllm_kernels.attention.plan_buffers import PlanBuffers
from batchllm_kernels.attention.triton_kernels import (
    INTERPRETED,
    attend_own_kernel,
    attend_shared_kernel,
    merge_splits_kernel,
)
from batchllm_kernels.attention.tuning import Tuning, multiprocessors, own_tile_rows

MERGE_HEAD_TILE = 4
MERGE_WARPS = 4
ALIGNMENT = 16  # bytes; Triton compiles other code for addresses that are no multiples of it
MOST_PROGRAMS = 65536
"""Programs of a launch of own items, at most. Each strides over the items, so that any number is right; one program an
item is fastest, and programs without an item end at once."""

Launcher = Callable[[tuple[int, int, int], tuple[Any, ...], bool], None]
"""Starts a kernel, of (grid, all its arguments with compile-time constants last, whether all addresses are aligned)."""


class _Parts(NamedTuple):
    """FlashAttention's results, as the own kernel takes them in."""

    results: torch.Tensor  # [rows, heads, head_size]
    lses: torch.Tensor  # fp32 [heads, rows]
    row_of_slot: torch.Tensor  # int32 [slots]
    lse_head_step: int


class PreparedLaunches:
    """The launches of one layer, for tensors of one shape, dtype and strides.

    Args:
        query, key_cache, value_cache, block_table, output: as in `api.prefix_shared_attention`; what is kept of them is
            shapes and strides.
        scale: factor of the scores before the softmax.
        buffers: plan and scratch space.
        tuning: launch parameters.
        make_launcher: makes what starts a kernel, of (kernel, options); the benchmark puts in one that starts some
            kernels only.

    Raises:
        ValueError: on a device other than CUDA, unless Triton interprets.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        block_table: torch.Tensor,
        output: torch.Tensor,
        scale: float,
        buffers: PlanBuffers,
        tuning: Tuning,
        make_launcher: Callable[[Any, dict[str, Any]], Launcher] | None = None,
    ) -> None:
        if query.device.type != "cuda" and not INTERPRETED and make_launcher is None:
            raise ValueError(
                f"impl: expected a CUDA device for 'triton' (or TRITON_INTERPRET=1 before Triton is imported), "
                f"got {query.device}"
            )
        _, heads, head_size = query.shape
        _, block_size, kv_heads, _ = key_cache.shape
        make_launcher = make_launcher or (interpreted_launcher if INTERPRETED else compiled_launcher)
        flash = buffers.flash
        constants = kernel_constants(
            heads // kv_heads, head_size, block_size, query.dtype, tuning, parts_in_rows=flash is not None
        )
        shared, own = tuning.shared, tuning.own
        self._shared = make_launcher(attend_shared_kernel, {"num_warps": shared.num_warps})
        # what the own kernel does not read without FlashAttention still has to have an address
        self._parts = _Parts(buffers.partials, buffers.lses, buffers.counts, 0)
        self._flash: FlashSharedLaunch | None = None
        if flash is not None:
            gather = make_launcher(gather_queries_kernel, {"num_warps": GATHER_WARPS})
            self._flash = FlashSharedLaunch(query, scale, flash, gather)
            self._parts = _Parts(flash.results, buffers.lses, flash.row_of_slot, 0)
        self._own = make_launcher(attend_own_kernel, {"num_warps": own.num_warps})
        self._merge = make_launcher(merge_splits_kernel, {"num_warps": MERGE_WARPS})
        self._scale_log2 = scale * math.log2(math.e)
        cache_strides = (*key_cache.stride()[:3], *value_cache.stride()[:3])
        strides = (query.stride(0), query.stride(1), *cache_strides, block_table.stride(0))
        output_strides = (output.stride(0), output.stride(1))
        self._heads = (heads, kv_heads)
        self._shared_numbers = (*self._heads, *strides, *constants["attend_shared_kernel"])
        self._own_numbers = (*strides, *output_strides, *constants["attend_own_kernel"])
        self._merge_numbers = (heads, *output_strides, *constants["merge_splits_kernel"])
        self._buffers = buffers
        processors = multiprocessors(query.device)
        programs = shared.programs_per_multiprocessor * processors
        merges = buffers.capacity.merges * triton.cdiv(heads, MERGE_HEAD_TILE)
        self._kv_heads = kv_heads
        self._shared_grid = (max(1, min(buffers.capacity.shared_items * kv_heads, programs)), 1, 1)
        # splits make more items than rows only where rows alone do not fill the device
        further_splits = own.programs_per_multiprocessor * processors
        self._own_grid = (min(len(query) * kv_heads + further_splits, MOST_PROGRAMS), 1, 1)
        self._merge_grid = (max(1, min(merges, programs)), 1, 1)

    def run(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        block_table: torch.Tensor,
        output: torch.Tensor,
        *,
        every_launch: bool,
    ) -> None:
        """Writes `output` in up to three launches: shared items, own items, the merge of split own items.

        Where FlashAttention runs the shared parts, the first launch is that which gathers its queries, and it.

        `every_launch`: also those that the loaded plan has nothing for, as a captured graph replays them for any plan.
        """
        buffers = self._buffers
        plan = buffers.plan
        parts = self._parts
        # all other tensors are our own, and aligned
        addresses = query.data_ptr() | key_cache.data_ptr() | value_cache.data_ptr() | block_table.data_ptr()
        aligned = not (addresses | output.data_ptr()) % ALIGNMENT
        if every_launch or plan is None or len(plan.shared_items):
            if self._flash is not None:
                lses = self._flash.run(query, key_cache, value_cache, buffers.counts, aligned=aligned)
                parts = parts._replace(lses=lses, lse_head_step=lses.stride(0))
            else:
                self._shared(
                    self._shared_grid,
                    (
                        query,
                        key_cache,
                        value_cache,
                        block_table,
                        buffers.shared_items,
                        buffers.shared_rows,
                        buffers.counts,
                        buffers.partials,
                        buffers.lses,
                        self._scale_log2,
                        *self._shared_numbers,
                    ),
                    aligned,
                )
        own_grid = self._own_grid
        if not every_launch and plan is not None:
            own_grid = (min(len(plan.own_items) * self._kv_heads, MOST_PROGRAMS), 1, 1)
        self._own(
            own_grid,
            (
                query,
                key_cache,
                value_cache,
                block_table,
                buffers.own_items,
                buffers.counts,
                output,
                buffers.partials,
                buffers.lses,
                parts.results,
                parts.lses,
                parts.row_of_slot,
                self._scale_log2,
                *self._heads,
                parts.lse_head_step,
                *self._own_numbers,
            ),
            aligned,
        )
        if every_launch or plan is None or len(plan.merges):
            self._merge(
                self._merge_grid,
                (buffers.partials, buffers.lses, buffers.merges, buffers.counts, output, *self._merge_numbers),
                aligned,
            )


def kernel_constants(
    queries_per_kv_head: int,
    head_size: int,
    block_size: int,
    dtype: torch.dtype,
    tuning: Tuning,
    *,
    parts_in_rows: bool,
) -> dict[str, tuple[Any, ...]]:
    """The compile-time constants of each kernel, by its name, in the order of its parameters."""
    padded = triton.next_power_of_2(head_size)
    dots = ("ieee" if dtype == torch.float32 else "tf32", INTERPRETED and dtype == torch.bfloat16)
    shared, own = tuning.shared, tuning.own
    model = (queries_per_kv_head, head_size, padded, block_size)
    return {
        "attend_shared_kernel": (
            *model,
            shared.low_tile_rows,
            shared.high_tile_rows,
            shared.kv_tile_tokens,
            shared.low_stages,
            shared.high_stages,
            *dots,
        ),
        "attend_own_kernel": (
            *model,
            own_tile_rows(queries_per_kv_head),
            own.kv_tile_tokens(block_size),
            own.stages,
            *dots,
            parts_in_rows,
        ),
        "merge_splits_kernel": (head_size, padded, MERGE_HEAD_TILE),
    }


def interpreted_launcher(kernel: Any, options: dict[str, Any]) -> Launcher:
    """Runs a kernel in Triton's interpreter."""

    def launch(grid: tuple[int, int, int], arguments: tuple[Any, ...], _aligned: bool) -> None:
        kernel[grid](*arguments, **options)

    return launch


def compiled_launcher(kernel: Any, options: dict[str, Any]) -> Launcher:
    """Starts what Triton compiled at the first call, as long as all addresses are aligned as they were then.

    Numbers are the same in every call, or not specialised, so that Triton would compile nothing else for them.
    """
    runners: dict[tuple[int, int, int], Callable[..., None]] = {}

    def launch(grid: tuple[int, int, int], arguments: tuple[Any, ...], aligned: bool) -> None:
        runner = runners.get(grid) if aligned else None
        if runner is not None:
            runner(*arguments)
            return
        compiled = kernel[grid](*arguments, enable_fp_fusion=True, **options)
        if aligned:
            runners[grid] = compiled[grid]

    return launch
