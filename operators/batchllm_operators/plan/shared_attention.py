"""Whether prefix-shared attention can pay for a job, from its plan alone, before an engine is loaded.

By the cost model of the kernels (`batchllm_kernels.attention.cost`), for the decode steps of a job that runs in its
planned order: members of a group together, as many requests as the KV cache holds. Sharing below a group's own prefix
is left out, and so are steps that compute prompts beside, of which each decides for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from batchllm_kernels.attention.cost import (
    KernelCalibration,
    Launching,
    ModelHeads,
    StepWork,
    Traffic,
    calibration_for,
    shared_path_seconds,
    unshared_seconds,
)
from batchllm_operators.columns.arrays import Floats, Int32s, Int64s
from batchllm_operators.machine.devices import gpu_model, gpus_of_machine
from batchllm_operators.models.model_shape import attention_shape, read_model_config
from batchllm_operators.records import AttentionForecast, Record
from batchllm_operators.specs.execution import ExecutionSpec, ModelSpec
from batchllm_operators.specs.planning import CostModel

NEEDED_SAVING = 0.01
"""The least share of the engines' time that must be saved: rates are good to a few per cent, and a job that gains less
need not run new kernels."""

SHARED_TILE_ROWS = 128
"""Query rows that read a shared prefix at once, of FlashAttention 3 and of the Triton kernel on an H100."""

BYTES_OF_16_BITS = 2

_STEPS_OF_TWO = 4
"""Groups are alike when their sizes and lengths differ by less than a factor of the fourth root of two."""


class EngineAttention(Record):
    """What is known of the attention of an engine before it is loaded: heads of one rank, and its device."""

    heads: int
    kv_heads: int
    head_size: int
    element_bytes: int = 2
    device: str = ""
    """As CUDA names it; empty: not known."""


@dataclass(frozen=True, slots=True)
class PlannedGroups:
    """The requests of a plan by prefix group.

    Attributes:
        size: int64 [G], requests.
        prefix_tokens: int64 [G], that all of a group share.
        own_tokens: float64 [G], of the prompt of one request behind the prefix, the mean of the group.
        output_tokens: float64 [G], expected of all requests together.
    """

    size: Int64s
    prefix_tokens: Int64s
    own_tokens: Floats
    output_tokens: Floats

    @classmethod
    def of_requests(
        cls, group: Int32s, prefix_tokens: Int32s, prompt_tokens: Int32s, output_tokens: Int32s
    ) -> PlannedGroups:
        """The groups of requests, whose columns have one entry for each request; groups are numbered from 0."""
        size = np.bincount(group).astype(np.int64)
        prefix = np.zeros(len(size), dtype=np.int64)
        prefix[group] = prefix_tokens
        prompts = np.bincount(group, weights=prompt_tokens, minlength=len(size))
        output = np.bincount(group, weights=output_tokens, minlength=len(size)).astype(np.float64)
        return cls(size, prefix, prompts / np.maximum(size, 1) - prefix, output)


@dataclass(frozen=True, slots=True)
class _Shape:
    """Groups that are alike, by their means, and the tokens that they generate together."""

    size: float
    prefix_tokens: float
    context_tokens: float
    """The mean context of one request behind the prefix, in tokens, half of its output included."""
    output_tokens: float


def engine_attention(model: ModelSpec, execution: ExecutionSpec) -> EngineAttention | None:
    """The engine whose attention the plan chooses: on a machine with GPUs, where the job leaves that to it. Else None.

    None also for a model whose configuration does not tell its heads: then the engine decides alone.

    Args:
        model: the model part of the job; its configuration is read, its weights are not.
        execution: the execution part.
    """
    if model.attention != "auto" or not gpus_of_machine():
        return None
    shape = attention_shape(read_model_config(model))
    if shape is None:
        return None
    ranks = execution.gpus_per_engine
    return EngineAttention(
        heads=max(shape.heads // ranks, 1),
        kv_heads=max(shape.kv_heads // ranks, 1),
        head_size=shape.head_size,
        element_bytes=4 if model.dtype == "float32" else 2,
        device=gpu_model() or "",
    )


def attention_forecast(
    groups: PlannedGroups,
    engine: EngineAttention,
    cost: CostModel,
    *,
    engine_seconds: float,
    calibration: KernelCalibration | None = None,
) -> AttentionForecast:
    """What prefix-shared attention saves of a job, and whether the engines are to get it.

    Args:
        groups: of the plan.
        engine: its attention.
        cost: rates of the engine: how many requests run at once, and how much of the time attention takes.
        engine_seconds: expected of all engines together, with vLLM's own attention.
        calibration: of the kernels; default: that of the engine's device.
    """
    # FlashAttention computes in 16 bits; a device without it has no entry for it
    shared_impl = "flash_attention_3" if engine.element_bytes == BYTES_OF_16_BITS else "triton"
    rates = calibration or calibration_for(engine.device, shared_impl)
    heads = ModelHeads(engine.heads, engine.kv_heads, engine.head_size, engine.element_bytes)
    from_memory = stock = best = kv_tokens = 0.0
    requests = int(groups.size.sum())
    for shape in _alike(groups):
        running, members = _at_once(shape, cost, requests)
        work = _step_work(shape, heads, members=members, running=running)
        steps = shape.output_tokens / running
        kv_tokens += shape.output_tokens * (shape.prefix_tokens + shape.context_tokens)
        fixed = rates.captured_launch_seconds
        from_memory += steps * (fixed + rates.stock_seconds(work.stock.without_l2))
        stock += steps * (fixed + rates.stock_seconds(work.stock))
        ours = unshared_seconds(work, Launching.CAPTURED, rates)
        if work.shared is not None:
            ours = min(ours, shared_path_seconds(work, Launching.CAPTURED, rates))
        best += steps * ours
    saving = engine_saving = 0.0
    if stock > 0 and engine_seconds > 0:
        saving = 1 - best / stock
        # The rates of the forecast read the whole context from memory, which stock attention of neighbours does not.
        attention = min(kv_tokens / cost.kv_tokens_per_second, engine_seconds)
        expected = attention * stock / from_memory
        engine_saving = saving * expected / (engine_seconds - attention + expected)
    return AttentionForecast(
        pays=engine_saving >= NEEDED_SAVING,
        attention_saving=round(saving, 4),
        engine_saving=round(engine_saving, 4),
        needed_saving=NEEDED_SAVING,
        rates=rates.source,
    )


def _alike(groups: PlannedGroups) -> Iterator[_Shape]:
    """A job has many groups and few kinds of them."""
    generating = groups.output_tokens > 0
    size, prefix, own, output = (
        column[generating].astype(np.float64)
        for column in (groups.size, groups.prefix_tokens, groups.own_tokens, groups.output_tokens)
    )
    context = own + output / size / 2
    kinds = np.rint(_STEPS_OF_TWO * np.log2(np.stack([size, prefix + 1, context + 1], axis=1))).astype(np.int64)
    if not len(kinds):
        return
    _, kind = np.unique(kinds, axis=0, return_inverse=True)
    kind = kind.reshape(-1)  # numpy 2.0 gives it a second axis
    tokens = np.bincount(kind, weights=output)
    means = (np.bincount(kind, weights=output * column) / tokens for column in (size, prefix, context))
    for a_size, a_prefix, a_context, all_tokens in zip(*means, tokens, strict=True):
        yield _Shape(float(a_size), float(a_prefix), float(a_context), float(all_tokens))


def _at_once(shape: _Shape, cost: CostModel, requests: int) -> tuple[float, float]:
    """Requests of such groups that run at once, and how many of them are of one group; a prefix is held once.

    Args:
        shape: of the groups.
        cost: what the engine holds.
        requests: of the whole job.
    """
    whole_group = shape.prefix_tokens + shape.size * shape.context_tokens
    members = shape.size
    if whole_group > cost.kv_capacity_tokens:
        room = (cost.kv_capacity_tokens - shape.prefix_tokens) / max(shape.context_tokens, 1.0)
        members = min(max(room, 1.0), shape.size)
    held = shape.prefix_tokens + members * shape.context_tokens
    running = members * max(cost.kv_capacity_tokens / max(held, 1.0), 1.0)
    running = max(min(running, float(cost.max_running_requests), float(requests)), 1.0)
    return running, min(members, running)


def _step_work(shape: _Shape, heads: ModelHeads, *, members: float, running: float) -> StepWork:
    """Traffic of one layer of a step of `running` requests, in groups of `members` that stand side by side."""
    groups = running / members
    kv_bytes, query_bytes = heads.kv_token_bytes, heads.query_token_bytes
    prefix_bytes, own_bytes = shape.prefix_tokens * kv_bytes, shape.context_tokens * kv_bytes
    once = groups * prefix_bytes + running * (own_bytes + 2 * query_bytes)
    stock = Traffic(once, (running - groups) * prefix_bytes)
    if members < 2 or not shape.prefix_tokens:
        return StepWork(stock, None, stock)
    tile_rows = max(SHARED_TILE_ROWS, heads.heads // heads.kv_heads)
    tiles = -(-members // (tile_rows // (heads.heads // heads.kv_heads)))
    shared = Traffic(
        groups * prefix_bytes + running * (query_bytes + heads.partial_bytes),
        groups * (tiles - 1) * prefix_bytes,
        4 * heads.head_size * heads.kv_heads * tile_rows * tiles * groups * shape.prefix_tokens,
    )
    own = Traffic(running * (own_bytes + 2 * query_bytes + heads.partial_bytes))
    return StepWork(stock, shared, own)
