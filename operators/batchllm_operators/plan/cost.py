"""What requests cost an engine: seconds of prefill and of decode, from rates that are measured or guessed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from batchllm_operators.plan.arrays import Floats, Int32s, Int64s
from batchllm_operators.plan.spec import CostModel

CPU_DEFAULT = CostModel(
    step_seconds=0.012,
    prefill_tokens_per_second=5_500,
    decode_tokens_per_second=3_200,
    kv_tokens_per_second=2_800_000,
    kv_capacity_tokens=170_000,
    max_running_requests=256,
)
"""A model of 0.1 billion parameters on two cores."""

GPU_DEFAULT = CostModel(
    step_seconds=0.007,
    prefill_tokens_per_second=30_000,
    decode_tokens_per_second=40_000,
    kv_tokens_per_second=20_000_000,
    kv_capacity_tokens=400_000,
    max_running_requests=1_024,
)
"""A model of 8 billion parameters on one GPU of 80 GB."""

_FASTEST = 1e12
"""Tokens a second of what takes no measurable time."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Steps of an engine, as a calibration runs them.

    Attributes:
        prefill_tokens: int64 [S], prompt tokens computed in each step.
        decode_tokens: int64 [S], tokens generated.
        kv_tokens: int64 [S], context tokens of the generating requests.
        seconds: float64 [S].
    """

    prefill_tokens: Int64s
    decode_tokens: Int64s
    kv_tokens: Int64s
    seconds: Floats


@dataclass(frozen=True, slots=True)
class Forecast:
    """Engine seconds of N requests.

    Attributes:
        prefill_per_token: seconds of one computed prompt token.
        decode: float64 [N], seconds of each whole completion.
    """

    prefill_per_token: float
    decode: Floats


def default_cost_model() -> CostModel:
    """Rates of the hardware at hand, where nothing has been measured: a guess by kind."""
    return GPU_DEFAULT if Path("/dev/nvidiactl").exists() else CPU_DEFAULT


def fit_cost_model(steps: StepTimes, *, kv_capacity_tokens: int, max_running_requests: int) -> CostModel:
    """The rates that explain measured steps best, by least squares with none negative.

    Raises:
        ValueError: fewer than 4 steps, or none with prefill or none with decode.
    """
    if len(steps.seconds) < 4 or not steps.prefill_tokens.any() or not steps.decode_tokens.any():
        raise ValueError(f"expected 4 steps or more, with prefill and decode among them, got {len(steps.seconds)}")
    columns = [np.ones(len(steps.seconds)), steps.prefill_tokens, steps.decode_tokens, steps.kv_tokens]
    measured = np.stack(columns, axis=1).astype(np.float64)
    best, least = np.zeros(4), np.inf
    # Four unknowns: every choice of which are zero is tried.
    for size in range(1, 5):
        for used in combinations(range(4), size):
            solution = np.zeros(4)
            solution[list(used)] = np.linalg.lstsq(measured[:, used], steps.seconds, rcond=None)[0]
            fault = float(np.square(measured @ solution - steps.seconds).sum())
            if (solution >= 0).all() and fault < least:
                best, least = solution, fault
    step, prefill, decode, kv = (float(value) for value in best)
    return CostModel(
        step_seconds=step,
        prefill_tokens_per_second=_rate(prefill),
        decode_tokens_per_second=_rate(decode),
        kv_tokens_per_second=_rate(kv),
        kv_capacity_tokens=kv_capacity_tokens,
        max_running_requests=max_running_requests,
    )


def forecast(prompt_tokens: Int32s, output_tokens: Int32s, cost: CostModel) -> Forecast:
    """Seconds that requests add to an engine that runs them together.

    As many run at a time as the KV cache holds of their mean size; they share the reading of the weights.

    Args:
        prompt_tokens: int32 [N].
        output_tokens: int32 [N], expected.
        cost: rates of the engine.
    """
    if len(prompt_tokens) == 0:
        return Forecast(1 / cost.prefill_tokens_per_second, np.zeros(0))
    context = prompt_tokens + output_tokens / 2
    fitting = cost.kv_capacity_tokens / max(float(context.mean()), 1.0)
    running = max(min(fitting, cost.max_running_requests, len(prompt_tokens)), 1.0)
    per_token = cost.step_seconds / running + 1 / cost.decode_tokens_per_second
    decode = output_tokens * (per_token + context / cost.kv_tokens_per_second)
    return Forecast(1 / cost.prefill_tokens_per_second, decode)


def _rate(seconds_per_token: float) -> float:
    return 1 / seconds_per_token if seconds_per_token > 1 / _FASTEST else _FASTEST
