"""Times of prefix-shared attention on a device, beside every other implementation that is at hand.

A result is checked against the fp32 reference before anything is timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from batchllm_kernels.attention.reference import paged_attention
from batchllm_kernels.bench.flash_attention_3 import FlashAttention3
from batchllm_kernels.bench.grid import GridPoint
from batchllm_kernels.bench.layered_step import LayeredStep, layered_step
from batchllm_kernels.bench.ours import (
    FLASH_OF_PLAN,
    FLASH_SHARED,
    IDLE,
    OURS,
    OWN_LAUNCH,
    SHARED,
    UNSHARED,
    flash_calls,
    idle_call,
    launches_alone,
    our_call,
    own_bytes,
    plan_of,
)
from batchllm_kernels.bench.rivals import FLASH_ATTENTION_3_NAMES, rivals
from batchllm_kernels.bench.timers import LayerCall, Timer

MAX_ERROR = 1e-2  # relative, bf16
MAX_ERROR_OF_ROUNDED_PARTS = 2e-2  # where partial results are bf16 too, as those of FlashAttention are
CHECKED_REQUESTS = 16


class WrongResultError(Exception):
    """An implementation's result is not that of the reference: there is nothing to time."""


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """One point of the grid.

    Attributes:
        point: what was measured.
        requests: that decode.
        layers: that were run one after the other, each with its own cache.
        microseconds: median time of a layer of each implementation, and of our launches alone (`ours.OURS`).
        skipped: implementations that are missing, and why.
        error: largest relative error of the shared path against the reference.
        minimum_bytes: unique keys and values, queries and outputs.
        dense_bytes: the same where every request reads its whole context.
        own_bytes: what the own launch reads and writes when shared parts are read apart.
    """

    point: GridPoint
    requests: int
    layers: int
    microseconds: dict[str, float]
    skipped: dict[str, str]
    error: float
    minimum_bytes: int
    dense_bytes: int
    own_bytes: int

    @property
    def best_other(self) -> str | None:
        """The fastest implementation that is not ours, None without one."""
        others = {name: time for name, time in self.microseconds.items() if name not in OURS}
        return min(others, key=others.__getitem__, default=None)

    @property
    def speedup(self) -> float | None:
        """Time of the fastest other implementation over that of the shared path, None without one."""
        return None if self.best_other is None else self.microseconds[self.best_other] / self.microseconds[SHARED]

    @staticmethod
    def of_row(row: dict[str, Any]) -> MeasuredPoint:
        """The point that a row of results tells of."""
        return MeasuredPoint(
            point=GridPoint(**row["point"]),
            requests=row["requests"],
            layers=row["layers"],
            microseconds=row["microseconds"],
            skipped=row["skipped"],
            error=row["relative_error"],
            minimum_bytes=round(row["unique_mb"] * 1e6),
            dense_bytes=round(row["dense_mb"] * 1e6),
            own_bytes=round(row["own_mb"] * 1e6),
        )

    def row(self, copy_bytes_per_second: float) -> dict[str, Any]:
        """What a table shows."""
        flash = [time for name, time in self.microseconds.items() if name in FLASH_ATTENTION_3_NAMES]
        seconds = self.microseconds[SHARED] / 1e6
        return {
            "point": asdict(self.point),
            "requests": self.requests,
            "layers": self.layers,
            "relative_error": self.error,
            "microseconds": self.microseconds,
            "skipped": self.skipped,
            "fastest_other": self.best_other,
            "speedup": self.speedup,
            "flash_attention_3_over_ours": min(flash) / self.microseconds[SHARED] if flash else None,
            "unique_mb": self.minimum_bytes / 1e6,
            "dense_mb": self.dense_bytes / 1e6,
            "share_of_copy_bandwidth": self.minimum_bytes / seconds / copy_bytes_per_second,
            "own_mb": self.own_bytes / 1e6,
            "own_bytes_per_second": self.own_bytes / (self.microseconds[OWN_LAUNCH] / 1e6),
        }


def measure_point(
    point: GridPoint,
    device: torch.device,
    timer: Timer,
    dtype: torch.dtype,
    flash_attention_3: FlashAttention3 | str,
    layers: int | None = None,
) -> MeasuredPoint:
    """Checks every implementation on one point, then times those that are right, in turns.

    Args:
        point: what to measure.
        device, dtype: where, and of which numbers.
        timer: `timers.graph_replay_times` on a device.
        flash_attention_3: the library, or why there is none.
        layers: each with a cache of its own; None for `layered_step.layer_count`.

    Raises:
        WrongResultError: when a result of ours is off by more than `MAX_ERROR`.
    """
    inputs = layered_step(point, device, dtype, layers=layers)
    plans = {name: plan_of(inputs, share=name == SHARED) for name in (SHARED, UNSHARED)}
    others = rivals(inputs, flash_attention_3)
    calls: dict[str, LayerCall] = {name: our_call(inputs, plan) for name, plan in plans.items()}
    flash = {} if isinstance(flash_attention_3, str) else flash_calls(inputs, flash_attention_3)
    expected = expected_rows(inputs)
    errors = checked_errors(calls, inputs, expected)
    whole = {name: flash.pop(name) for name in (FLASH_SHARED, FLASH_OF_PLAN) if name in flash}
    for name, rival in (others.calls | whole).items():
        try:
            checked_errors({SHARED: calls[SHARED], name: rival}, inputs, expected)
        except (WrongResultError, RuntimeError) as error:  # a rival that fails does not cost our own figures
            others.skipped[name] = f"{type(error).__name__}: {error}"[:500]
        else:
            calls[name] = rival
    if FLASH_SHARED in calls:
        calls |= flash
    calls |= launches_alone(inputs, plans[SHARED])
    calls[IDLE] = idle_call(inputs, plans[SHARED])
    return MeasuredPoint(
        point=point,
        requests=len(inputs.seq_lens),
        layers=inputs.layers,
        microseconds=timer(calls, inputs.layers),
        skipped=others.skipped,
        error=errors[SHARED],
        minimum_bytes=inputs.unique_bytes,
        dense_bytes=inputs.dense_bytes,
        own_bytes=own_bytes(inputs, plans[SHARED]),
    )


Expected = dict[int, torch.Tensor]
"""The fp32 reference of the requests `checked_requests`, by layer."""


def checked_requests(inputs: LayeredStep) -> torch.Tensor:
    """int64, some requests from the first to the last."""
    requests = len(inputs.seq_lens)
    return torch.linspace(0, requests - 1, min(CHECKED_REQUESTS, requests)).long().to(inputs.device)


def expected_rows(inputs: LayeredStep) -> Expected:
    """The reference for the first and the last layer."""
    some = checked_requests(inputs)
    return {
        layer: paged_attention(
            inputs.query[some],
            *inputs.caches[layer],
            inputs.block_table[some],
            inputs.seq_lens[some],
            inputs.query_start_loc[: len(some) + 1],  # one query token each: tokens and requests have one numbering
            inputs.scale,
        )
        for layer in sorted({0, inputs.layers - 1})
    }


def checked_errors(
    calls: Mapping[str, LayerCall], inputs: LayeredStep, expected: Expected | None = None
) -> dict[str, float]:
    """Largest error of each implementation over the first and the last layer, over the largest number expected.

    Some requests are compared with the reference; all others must agree with the first implementation.

    Args:
        calls: implementations.
        inputs: the step.
        expected: of `expected_rows`, where it is at hand.

    Raises:
        WrongResultError: when one is larger than the largest allowed, or a number is missing.
    """
    some = checked_requests(inputs)
    errors = dict.fromkeys(calls, 0.0)
    for layer, reference in (expected or expected_rows(inputs)).items():
        first: torch.Tensor | None = None
        for name, call in calls.items():
            inputs.output.fill_(torch.nan)
            result = call(layer).float()
            if first is None:
                first = result.clone()
            off = torch.maximum((result[some] - reference).abs().max(), (result - first).abs().max() / 2)
            error = float(off / reference.abs().max())  # NaN where a number is missing
            most = MAX_ERROR_OF_ROUNDED_PARTS if name in (FLASH_SHARED, FLASH_OF_PLAN) else MAX_ERROR
            if not error <= most:
                raise WrongResultError(
                    f"{name}: expected a relative error of at most {most}, got {error:.3g} in layer {layer}"
                )
            errors[name] = max(errors[name], error)
    return errors
