"""Where the benchmark runs: on a CUDA device, or as a rehearsal in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from batchllm_kernels.bench.flash_attention_3 import FlashAttention3, FlashAttention3UnavailableError
from batchllm_kernels.bench.grid import GridPoint, important_points, whole_grid
from batchllm_kernels.bench.timers import Timer, captured, graph_replay_times, wall_clock_times

Capture = Callable[[Callable[[], object]], Callable[[], None]]
"""Makes a replay of a step that launches kernels."""

REHEARSED_POINTS = (
    GridPoint(64, 3, own=5, heads=4, kv_heads=2, head_size=16, requests=6),
    GridPoint(48, 2, own=20, heads=4, kv_heads=2, head_size=16, requests=4, shuffled=True),
)


@dataclass(frozen=True, slots=True)
class Setup:
    """What the stages of a run share.

    Attributes:
        device, dtype: of all tensors.
        timer: microseconds a layer of several implementations.
        capture: how a step becomes one that can be replayed.
        flash_attention_3: the library, or why there is none.
        layers: of a measured point; None for as many as leave the second-level cache cold.
        rehearsal: shapes are tiny and times mean nothing.
    """

    device: torch.device
    dtype: torch.dtype
    timer: Timer
    capture: Capture
    flash_attention_3: FlashAttention3 | str
    layers: int | None
    rehearsal: bool

    def points(self, *, important: bool) -> Iterable[GridPoint]:
        """Points to measure, the important ones or all."""
        if self.rehearsal:
            return REHEARSED_POINTS[:1] if important else REHEARSED_POINTS
        return important_points() if important else whole_grid()


def cuda_setup(library: Path | None) -> Setup:
    """A run on the current CUDA device; `library` is FlashAttention 3's, None for the environment's."""
    return Setup(
        torch.device("cuda"), torch.bfloat16, graph_replay_times, _captured, _flash_attention_3(library), None, False
    )


def rehearsal_setup(library: Path | None) -> Setup:
    """A run of tiny shapes without a device, to see that every stage works."""
    return Setup(
        torch.device("cpu"), torch.float32, wall_clock_times, _uncaptured, _flash_attention_3(library), 2, True
    )


def _flash_attention_3(library: Path | None) -> FlashAttention3 | str:
    try:
        return FlashAttention3(library)
    except FlashAttention3UnavailableError as error:
        return str(error)


def _captured(step: Callable[[], object]) -> Callable[[], None]:
    graph = captured(step)

    def replay() -> None:
        graph.replay()

    return replay


def _uncaptured(step: Callable[[], object]) -> Callable[[], None]:
    def replay() -> None:
        step()

    return replay
