"""Compiles the kernels to machine code without a device, and reads what they use."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchllm_kernels.attention.flash_kernels import copy_blocks_kernel, gather_queries_kernel
from batchllm_kernels.attention.flash_launch import COPY_TILE, COPY_WARPS, GATHER_WARPS, gather_constants
from batchllm_kernels.attention.flash_shared import DTYPES as FLASH_DTYPES
from batchllm_kernels.attention.launch import MERGE_WARPS, kernel_constants
from batchllm_kernels.attention.triton_kernels import attend_own_kernel, attend_shared_kernel, merge_splits_kernel
from batchllm_kernels.attention.tuning import tuning_for

ELEMENT_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
WARP_THREADS = 32
FLASH_ARCHITECTURE = "sm90"  # the one that FlashAttention 3 runs on


@dataclass(frozen=True, slots=True)
class KernelResources:
    """What one compiled kernel uses.

    Attributes:
        kernel: its name.
        architecture: as `sm90`.
        registers: of a thread.
        shared_bytes: shared memory of a program.
        stack_bytes: local memory of a thread: spilled registers.
    """

    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int


def compile_kernels(
    architecture: str, *, heads: int, kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype
) -> list[KernelResources]:
    """Compiles all kernels to cubins with the launch parameters of the tuning table.

    Raises:
        ValueError: for an architecture not named like `sm90`, or a head size that the table has not.
    """
    match = re.fullmatch(r"sm(\d+)", architecture)
    if not match:
        raise ValueError(f"architecture: expected a name like 'sm90', got {architecture!r}")
    target = GPUTarget("cuda", int(match[1]), WARP_THREADS)
    tuning = tuning_for(architecture, head_size, dtype).with_room_for(heads // kv_heads)
    element = f"*{ELEMENT_TYPES[dtype]}"
    pointers = dict.fromkeys(("query", "key_cache", "value_cache", "output"), element)
    pointers |= dict.fromkeys(("partials", "lses", "part_lses"), "*fp32")
    pointers |= dict.fromkeys(("parts", "gathered"), element)
    model = heads // kv_heads, head_size, block_size, dtype, tuning
    constants = kernel_constants(*model, parts_in_rows=False)
    compiled = [
        _compile(kernel, pointers, constants[kernel.__name__], target, {"num_warps": warps})
        for kernel, warps in (
            (attend_shared_kernel, tuning.shared.num_warps),
            (attend_own_kernel, tuning.own.num_warps),
            (merge_splits_kernel, MERGE_WARPS),
        )
    ]
    if dtype in FLASH_DTYPES and architecture == FLASH_ARCHITECTURE:
        constants = kernel_constants(*model, parts_in_rows=True)
        for kernel, of_kernel, warps in (
            (attend_own_kernel, constants["attend_own_kernel"], tuning.own.num_warps),
            (gather_queries_kernel, gather_constants(head_size), GATHER_WARPS),
            (copy_blocks_kernel, (block_size, COPY_TILE), COPY_WARPS),
        ):
            made = _compile(kernel, pointers, of_kernel, target, {"num_warps": warps})
            compiled.append(replace(made, kernel=f"{made.kernel}, with FlashAttention 3"))
    return compiled


def _compile(
    kernel: Any, pointers: dict[str, str], values: tuple[Any, ...], target: GPUTarget, options: dict[str, int]
) -> KernelResources:
    signature: dict[str, str] = {}
    aligned = {}
    constants = dict(zip(kernel.arg_names[-len(values) :], values, strict=True))
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "scale_log2":
            signature[name] = "fp32"
        elif name in ("heads", "kv_heads", "part_lse_head_step"):
            signature[name] = "i32"
        else:
            # what the launcher finds of real tensors: allocations and strides are multiples of 16
            signature[name] = "i32" if name.endswith("_stride") else pointers.get(name, "*i32")
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})
    usage = _resource_usage(compiled.asm["cubin"])
    return KernelResources(
        kernel=kernel.__name__,
        architecture=f"sm{target.arch}",
        registers=usage["REG"],
        shared_bytes=int(compiled.metadata.shared),
        stack_bytes=usage["STACK"] + usage["LOCAL"],
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
