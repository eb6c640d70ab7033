"""Times of prefix-shared attention on a device, beside every other implementation that is at hand.

A result is checked against the fp32 reference before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product

import torch

from batchllm_kernels.attention.api import plan_shape, prefix_shared_attention
from batchllm_kernels.attention.cost import ModelHeads, StepCost, planned_cost, stock_cost
from batchllm_kernels.attention.plan_buffers import PlanBuffers
from batchllm_kernels.attention.reference import paged_attention
from batchllm_kernels.attention.work_plan import plan_work
from batchllm_kernels.bench.workloads import DecodeStep, decode_step, groups

SHARED, UNSHARED = "prefix-shared", "prefix-shared kernels without sharing"
MAX_ERROR = 1e-2  # relative, bf16
CHECKED_REQUESTS = 16
MAX_CACHE_BYTES = 24 * 1024**3
MAX_REQUESTS = 256

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Timer = Callable[[Callable[[], torch.Tensor]], float]


class WrongResultError(Exception):
    """An implementation's result is not that of the reference: there is nothing to time."""


@dataclass(frozen=True, slots=True)
class GridPoint:
    """A decode step to measure: prefix groups of one shape, lengths in tokens."""

    prefix: int
    degree: int
    own: int
    heads: int
    kv_heads: int
    head_size: int = 128
    block_size: int = 16

    @property
    def model(self) -> ModelHeads:
        """Its heads, in bf16."""
        return ModelHeads(self.heads, self.kv_heads, self.head_size)

    def step(self) -> DecodeStep:
        """As many groups as fit the requests and the memory of the benchmark, at least one."""
        dense_bytes = self.degree * (self.prefix + self.own) * self.model.kv_token_bytes
        count = max(1, min(MAX_REQUESTS // self.degree, MAX_CACHE_BYTES // dense_bytes))
        requests = groups(count, prefix=self.prefix, own=self.own, degree=self.degree)
        return decode_step(f"{self.prefix} + {self.own}, degree {self.degree}", requests, self.block_size)


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """One point of the grid.

    Attributes:
        point: what was measured.
        requests: that decode.
        microseconds: median time of each implementation.
        error: largest relative error of the shared path against the reference.
        shared, stock: modelled cost of both paths.
        minimum_bytes: unique keys and values, queries and outputs.
    """

    point: GridPoint
    requests: int
    microseconds: dict[str, float]
    error: float
    shared: StepCost
    stock: StepCost
    minimum_bytes: int

    @property
    def best_other(self) -> str:
        """The fastest implementation that is not ours."""
        others = {name: time for name, time in self.microseconds.items() if name not in (SHARED, UNSHARED)}
        return min(others, key=others.__getitem__)

    @property
    def speedup(self) -> float:
        """Time of the fastest other implementation over that of the shared path."""
        return self.microseconds[self.best_other] / self.microseconds[SHARED]


def issue_grid(*, quick: bool = False) -> Iterator[GridPoint]:
    """The grid of shapes; `quick` takes one head count and the corners."""
    prefixes = (256, 2000, 16384) if quick else (256, 1024, 2000, 4096, 16384)
    degrees = (2, 16, 128) if quick else (2, 4, 8, 16, 32, 64, 128)
    own = (200,) if quick else (32, 200, 512)
    heads = ((32, 8),) if quick else ((32, 8), (40, 8), (64, 8))
    for (query_heads, kv_heads), prefix, degree, own_tokens in product(heads, prefixes, degrees, own):
        yield GridPoint(prefix, degree, own_tokens, query_heads, kv_heads)


def measure_point(point: GridPoint, device: torch.device, timer: Timer, dtype: torch.dtype) -> MeasuredPoint:
    """Checks every implementation on one point, then times it.

    Raises:
        WrongResultError: when a result is off by more than `MAX_ERROR`.
    """
    step = point.step()
    inputs = point_inputs(step, point, device, dtype)
    scale = point.head_size**-0.5
    shape = plan_shape(
        block_size=point.block_size,
        heads=point.heads,
        kv_heads=point.kv_heads,
        head_size=point.head_size,
        dtype=dtype,
        device=device,
    )
    plans = {
        name: plan_work(step.block_table, step.seq_lens, step.query_start_loc, shape, share=name == SHARED)
        for name in (SHARED, UNSHARED)
    }
    calls: dict[str, Callable[[], torch.Tensor]] = {
        name: partial(
            prefix_shared_attention,
            *inputs,
            scale=scale,
            plan=PlanBuffers.of_plan(plan, point.heads, point.head_size, device),
            impl="triton",
        )
        for name, plan in plans.items()
    }
    calls |= _other_implementations(inputs, scale, step)
    errors = _checked_errors(calls, inputs, scale)
    least_read = step.unique_kv_tokens * point.model.kv_token_bytes
    return MeasuredPoint(
        point=point,
        requests=len(step.seq_lens),
        microseconds={name: timer(call) for name, call in calls.items()},
        error=errors[SHARED],
        shared=planned_cost(plans[SHARED], step.seq_lens, step.query_start_loc, point.model),
        stock=stock_cost(step.seq_lens, step.query_start_loc, shape, point.model),
        minimum_bytes=least_read + 2 * len(step.seq_lens) * point.model.query_token_bytes,
    )


def point_inputs(step: DecodeStep, point: GridPoint, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random query and cache of a step, with its block table and lengths on the device."""
    generator = torch.Generator(device).manual_seed(0)
    cache = torch.randn(
        (step.blocks, point.kv_heads, point.block_size, 2 * point.head_size),
        generator=generator,
        device=device,
        dtype=dtype,
    )
    keys, values = cache.transpose(1, 2).split(point.head_size, dim=-1)
    query = torch.randn(
        (len(step.seq_lens), point.heads, point.head_size), generator=generator, device=device, dtype=dtype
    )
    table, lengths, starts = (
        torch.from_numpy(array).to(device) for array in (step.block_table, step.seq_lens, step.query_start_loc)
    )
    return query, keys, values, table, lengths, starts


def _checked_errors(calls: dict[str, Callable[[], torch.Tensor]], inputs: Inputs, scale: float) -> dict[str, float]:
    query, keys, values, table, lengths, starts = inputs
    some = torch.linspace(0, len(lengths) - 1, min(CHECKED_REQUESTS, len(lengths))).long().to(query.device)
    expected = paged_attention(
        query[some], keys, values, table[some], lengths[some], starts[: len(some) + 1], scale
    )  # one query token each, so that tokens and requests have one numbering
    errors = {}
    for name, call in calls.items():
        result = call()[some].float()
        errors[name] = float((result - expected).abs().max() / expected.abs().max())
        if not errors[name] <= MAX_ERROR:
            raise WrongResultError(f"{name}: expected a relative error of at most {MAX_ERROR}, got {errors[name]:.3g}")
    return errors


def _other_implementations(inputs: Inputs, scale: float, step: DecodeStep) -> dict[str, Callable[[], torch.Tensor]]:
    query, keys, values, table, lengths, starts = inputs
    made: dict[str, Callable[[], torch.Tensor]] = {
        "torch SDPA on a copy for each request": partial(_dense_attention, *_dense_copies(inputs, step), scale)
    }
    if query.device.type != "cuda":
        return made
    if find_spec("flash_attn"):
        flash_attention = import_module("flash_attn").flash_attn_with_kvcache
        paged = [cache.contiguous() for cache in (keys, values)]  # tokens before heads in memory
        made["FlashAttention"] = lambda: flash_attention(
            query[:, None], *paged, cache_seqlens=lengths, block_table=table, softmax_scale=scale, causal=True
        )[:, 0]
    if find_spec("vllm"):
        from batchllm_kernels.vllm_plugin import stock_attention

        arguments = (query, keys, values, table, lengths, starts, scale)
        made["vLLM unified attention"] = partial(stock_attention.unified_attention, *arguments)
        made["vLLM FlashAttention"] = partial(stock_attention.flash_attention, *arguments)
    return made


def _dense_copies(inputs: Inputs, step: DecodeStep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [R, heads, 1, head_size], keys and values [R, kv_heads, length, head_size]; all requests are as long."""
    query, keys, values, table, _, _ = inputs
    length = int(step.seq_lens[0])
    dense_keys, dense_values = (
        cache[table.long()].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for cache in (keys, values)
    )
    return query[:, :, None], dense_keys, dense_values


def _dense_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)[:, :, 0]


def device_timer(call: Callable[[], torch.Tensor]) -> float:
    """Median microseconds on the device, its second-level cache cold as between the layers of a model."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(call, warmup=10, rep=60, return_mode="median"))


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 2 GiB."""
    size = 2 * 1024**3
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / (device_timer(lambda: target.copy_(source)) / 1e6)


def matmul_flops_per_second(device: torch.device) -> float:
    """Operations a second of a square bf16 product."""
    size = 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (device_timer(lambda: left @ right) / 1e6)
