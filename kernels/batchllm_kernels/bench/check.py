"""Every kernel against the fp32 reference on odd shapes, out of poisoned memory: without it no figure counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from batchllm_kernels.attention.flash_shared import DTYPES, VarlenAttention
from batchllm_kernels.attention.reference import paged_attention
from batchllm_kernels.bench.grid import GridPoint
from batchllm_kernels.bench.layered_step import LayeredStep
from batchllm_kernels.bench.measure import WrongResultError
from batchllm_kernels.bench.ours import FLASH_OF_PLAN, FLASH_SHARED, flash_calls, our_call, plan_of
from batchllm_kernels.bench.workloads import DecodeStep, SharingRequest, decode_step

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
PARENT, DOCUMENT, OTHER = ("parent", 96), ("document", 192), ("other", 130)


@dataclass(frozen=True, slots=True)
class CheckCase:
    """One step to compute with and without sharing.

    Attributes:
        name: what is odd about it.
        requests: that decode.
        heads, kv_heads, head_size, dtype, block_size: of model and cache.
        padding: rows without a request behind the others, as a captured step has them.
    """

    name: str
    requests: tuple[SharingRequest, ...]
    heads: int = 8
    kv_heads: int = 2
    head_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 16
    padding: int = 0


def group(degree: int, *, prefix: int = 200) -> tuple[SharingRequest, ...]:
    """Members of one prefix, each with another number of own tokens."""
    return tuple(SharingRequest((("prefix", prefix),), 3 + 7 * n) for n in range(degree))


def tree() -> tuple[SharingRequest, ...]:
    """Two documents under one parent, a group and a lone request beside them, in no order."""
    made = [
        SharingRequest(prefixes, own)
        for prefixes, owns in (
            ((PARENT, DOCUMENT), (5, 16, 9, 30, 1)),
            ((PARENT, OTHER), (33, 20, 2)),
            ((("elsewhere", 160),), (1, 17)),
            ((), (70,)),
        )
        for own in owns
    ]
    return tuple(made[at] for at in np.random.default_rng(1).permutation(len(made)))


def check_cases(*, quick: bool = False) -> Iterator[CheckCase]:
    """Odd shapes; `quick` takes one of each kernel, small enough for a sanitizer."""
    yield CheckCase("prefixes of two levels", tree())
    yield CheckCase("long contexts of few rows, which are split", group(3, prefix=3000))
    if quick:
        return
    yield CheckCase("padding rows", tree(), padding=5)
    yield CheckCase("more members than a tile has rows", group(70, prefix=300))
    yield CheckCase("one request", (SharingRequest((), 65),))
    yield CheckCase("one long request", (SharingRequest((), 9001),))
    for heads, kv_heads in ((2, 2), (6, 2), (16, 2), (32, 1)):
        yield CheckCase(f"{heads} heads for {kv_heads}", tree(), heads=heads, kv_heads=kv_heads)
    for head_size, dtype in (
        (64, torch.float16), (80, torch.bfloat16), (96, torch.float16), (256, torch.bfloat16),
        (64, torch.float32), (128, torch.float32), (128, torch.float16), (256, torch.float32),
    ):  # fmt: skip
        yield CheckCase(f"heads of {head_size} in {str(dtype)[6:]}", tree(), head_size=head_size, dtype=dtype)
    for heads in (32, 40, 64):  # of the points that are timed: their kernels are compiled here
        yield CheckCase(f"{heads} heads for 8", (*tree(), *group(20)), heads=heads, kv_heads=8)
    yield CheckCase("32 heads for 8, blocks of 32", tree(), heads=32, kv_heads=8, block_size=32)
    for block_size in (32, 64):
        yield CheckCase(f"blocks of {block_size}", (*tree(), *group(20)), block_size=block_size)


def check(
    case: CheckCase, device: torch.device, flash_attention_3: VarlenAttention | str = "not asked for"
) -> dict[str, Any]:
    """Errors of one case with and without sharing, relative to the largest number expected.

    Args:
        case: what to compute.
        device: that computes it.
        flash_attention_3: for shared parts of 16 bits, or why there is none.

    Raises:
        WrongResultError: when one is larger than the dtype allows, or not a number.
    """
    inputs = poisoned_step(case, device)
    keys, values = inputs.caches[0]
    # on the host, so that a sanitizer has no other kernels than ours to look at
    expected = paged_attention(
        inputs.query.cpu(),
        keys.cpu(),
        values.cpu(),
        inputs.block_table.cpu(),
        inputs.seq_lens.cpu(),
        inputs.query_start_loc.cpu(),
        inputs.scale,
    ).to(device)
    real = len(case.requests)
    calls = {
        "shared": our_call(inputs, plan_of(inputs, share=True)),
        "unshared": our_call(inputs, plan_of(inputs, share=False), every_launch=False),
    }
    if case.dtype in DTYPES and not isinstance(flash_attention_3, str):
        flash = flash_calls(inputs, flash_attention_3)
        calls |= {name: flash[name] for name in (FLASH_SHARED, FLASH_OF_PLAN) if name in flash}
    errors: dict[str, float] = {}
    for name, call in calls.items():
        inputs.output.fill_(torch.nan)
        off = (call(0).float()[:real] - expected[:real]).abs().max() / expected[:real].abs().max()
        errors[name] = float(off)
    tolerance = TOLERANCES[case.dtype]
    if not all(error <= tolerance for error in errors.values()):
        raise WrongResultError(f"{case.name}: expected relative errors of at most {tolerance}, got {errors}")
    return {"errors": errors, "tolerance": tolerance}


def poisoned_step(case: CheckCase, device: torch.device) -> LayeredStep:
    """A case's step with one layer, where whatever no request may read is NaN."""
    step = _padded(decode_step(case.name, list(case.requests), case.block_size), case.padding)
    shape = (step.blocks, case.kv_heads, case.block_size, 2 * case.head_size)
    generator = torch.Generator(device).manual_seed(0)
    cache = torch.empty(shape, device=device, dtype=case.dtype).normal_(generator=generator)
    unread = np.ones((step.blocks, case.block_size), dtype=bool)
    for row, length in zip(step.block_table, step.seq_lens.tolist(), strict=True):
        position = np.arange(length)
        unread[row[position // case.block_size], position % case.block_size] = False
    cache.masked_fill_(torch.from_numpy(unread).to(device)[:, None, :, None], torch.nan)
    keys, values = cache.transpose(1, 2).split(case.head_size, dim=-1)
    query = torch.empty((len(step.seq_lens), case.heads, case.head_size), device=device, dtype=case.dtype)
    query.normal_(generator=generator)
    table, lengths, starts = (
        torch.from_numpy(array).to(device) for array in (step.block_table, step.seq_lens, step.query_start_loc)
    )
    point = GridPoint(0, 1, 0, case.heads, case.kv_heads, case.head_size, case.block_size, len(step.seq_lens))
    return LayeredStep(point, step, query, torch.empty_like(query), ((keys, values),), table, lengths, starts)


def _padded(step: DecodeStep, rows: int) -> DecodeStep:
    return replace(
        step,
        block_table=np.pad(step.block_table, ((0, rows), (0, 0))),
        seq_lens=np.pad(step.seq_lens, (0, rows)),
        query_start_loc=np.pad(step.query_start_loc, (0, rows), mode="edge"),
    )
