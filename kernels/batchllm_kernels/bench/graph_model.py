"""Launches and fixed costs of a captured decode step, without a device: what idle sharing costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from batchllm_kernels.attention.cost import CAPTURED_LAUNCHES, KernelCalibration, ModelHeads, Traffic
from batchllm_kernels.bench.byte_model import EXPECTED

MOST_IDLE_SHARE = 0.03
"""The most that idle launches may take of a step in which nothing is shared."""

ITEM_BYTES = 24  # of an own item: six numbers of 32 bits, read by the programs of each KV head
STOCK_LAUNCHES = 1


@dataclass(frozen=True, slots=True)
class GraphModel:
    """A model on one rank: its layers, their heads, and the bytes of weights that a step reads."""

    name: str
    layers: int
    heads: ModelHeads
    weight_bytes: float


MODELS = (
    GraphModel("0.6B", 28, ModelHeads(16, 8, 128), 1.19e9),
    GraphModel("8B", 32, ModelHeads(32, 8, 128), 15.0e9),
    GraphModel("70B, one of 4 ranks", 80, ModelHeads(16, 2, 128), 34.8e9),
)
STEPS = ((16, 1000), (64, 1000), (256, 1000), (1024, 400))
"""Requests and tokens of context of each."""


@dataclass(frozen=True, slots=True)
class PredictedStep:
    """One decode step in which nothing is shared, captured with vLLM's own attention and with ours.

    Attributes:
        model: its name.
        layers: of the model.
        requests, context_tokens: that decode, and of each of them.
        stock_launches, our_launches: of attention, in the whole step.
        stock_fixed_us, our_fixed_us: fixed costs of these launches.
        step_ms: weights and KV cache read once, and the fixed costs with vLLM's own attention; nothing else of a step.
        idle_share: what ours adds for launches without work and for reading its items, over `step_ms`.
        within_limit: whether that is at most `MOST_IDLE_SHARE`.
        own_rate_share: what it adds besides, where the own launch reads as fast as is expected of it rather than as
            fast as vLLM's own attention.
        graphs_ms: what the step would take longer were it captured in pieces, by vLLM's own threads.
    """

    model: str
    layers: int
    requests: int
    context_tokens: int
    stock_launches: int
    our_launches: int
    stock_fixed_us: float
    our_fixed_us: float
    step_ms: float
    idle_share: float
    within_limit: bool
    own_rate_share: float
    graphs_ms: float


def graph_report(rates: KernelCalibration = EXPECTED) -> dict[str, Any]:
    """Every model with every step; a captured step launches the same, whether it shares or not."""
    return {
        "kind": "launches and bytes of captured decode steps in which nothing is shared, nothing measured",
        "most idle share": MOST_IDLE_SHARE,
        "rates": asdict(rates),
        "rows": [asdict(step) for step in captured_steps(rates)],
    }


def captured_steps(rates: KernelCalibration = EXPECTED) -> Iterator[PredictedStep]:
    """Every model with every step."""
    for model in MODELS:
        for requests, context in STEPS:
            yield _captured_step(model, requests, context, rates)


def _captured_step(model: GraphModel, requests: int, context: int, rates: KernelCalibration) -> PredictedStep:
    heads = model.heads
    attention = Traffic(requests * (context * heads.kv_token_bytes + 2 * heads.query_token_bytes))
    launch = rates.captured_launch_seconds
    stock = STOCK_LAUNCHES * launch + rates.stock_seconds(attention)
    step = model.weight_bytes / rates.stock_bytes_per_second + model.layers * stock
    items = Traffic(requests * ITEM_BYTES, (heads.kv_heads - 1) * requests * ITEM_BYTES)
    idle = (CAPTURED_LAUNCHES - STOCK_LAUNCHES) * launch + rates.own_seconds(items)
    slower = rates.own_seconds(attention) - rates.stock_seconds(attention)
    idle_share = model.layers * idle / step
    return PredictedStep(
        model=model.name,
        layers=model.layers,
        requests=requests,
        context_tokens=context,
        stock_launches=STOCK_LAUNCHES * model.layers,
        our_launches=CAPTURED_LAUNCHES * model.layers,
        stock_fixed_us=1e6 * STOCK_LAUNCHES * model.layers * launch,
        our_fixed_us=1e6 * CAPTURED_LAUNCHES * model.layers * launch,
        step_ms=1e3 * step,
        idle_share=idle_share,
        within_limit=idle_share <= MOST_IDLE_SHARE,
        own_rate_share=model.layers * slower / step,
        graphs_ms=1e3 * model.layers * rates.uncaptured_layer_seconds,
    )
