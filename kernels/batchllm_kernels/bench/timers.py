"""Clocks of the benchmark: replayed CUDA graphs for attention, and plain rates of a device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import torch

LayerCall = Callable[[int], torch.Tensor]
"""Runs one layer of a step, by its number, and returns the output."""

Timer = Callable[[Mapping[str, LayerCall], int], dict[str, float]]
"""Microseconds a layer of each implementation, from calls and a number of layers."""

ROUNDS = 5
ROUND_MICROSECONDS = 2500.0
MOST_REPLAYS = 50


def graph_replay_times(calls: Mapping[str, LayerCall], layers: int) -> dict[str, float]:
    """Median microseconds a layer, with nothing of the host in them.

    All layers of an implementation are captured in one CUDA graph. In each round every implementation's graph is
    replayed some times in a row, so that what drifts meets all of them alike.
    """
    graphs = {name: captured(partial(_all_layers, call, layers)) for name, call in calls.items()}
    lengths = {name: _length(graph) for name, graph in graphs.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name].append(_round(graph, lengths[name]) / layers)
    return {name: median(values) for name, values in times.items()}


def _all_layers(call: LayerCall, layers: int) -> None:
    for layer in range(layers):
        call(layer)


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what `step` launches; it is run once before, so that kernels are compiled and loaded."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def _length(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay, about."""
    _replay_microseconds(graph, 1)  # the first replay uploads the graph
    return _replay_microseconds(graph, 2)


def _round(graph: torch.cuda.CUDAGraph, length: float) -> float:
    replays = max(1, min(MOST_REPLAYS, math.ceil(ROUND_MICROSECONDS / length)))
    if length < ROUND_MICROSECONDS:
        graph.replay()  # keeps the device busy while the host records the event, so that no gap is counted
    return _replay_microseconds(graph, replays)


def _replay_microseconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * float(start.elapsed_time(end)) / replays


def wall_clock_times(calls: Mapping[str, LayerCall], layers: int) -> dict[str, float]:
    """Microseconds a layer by the host's clock, each call once: for rehearsals without a device."""
    times = {}
    for name, call in calls.items():
        start = time.perf_counter()
        for layer in range(layers):
            call(layer)
        times[name] = 1e6 * (time.perf_counter() - start) / layers
    return times


def copy_bytes_per_second(device: torch.device, size: int = 2 * 1024**3) -> float:
    """Bytes read and written a second by a copy of `size` bytes."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / (_benchmarked_microseconds(lambda: target.copy_(source), device) / 1e6)


def matmul_flops_per_second(device: torch.device, size: int = 8192) -> float:
    """Operations a second of a square bf16 product of random numbers."""
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return float(2 * size**3 / (_benchmarked_microseconds(lambda: left @ right, device) / 1e6))


def _benchmarked_microseconds(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Median of a call so long that the host's time does not show."""
    if device.type != "cuda":
        return wall_clock_times({"": lambda _: call()}, 1)[""]
    from triton.testing import do_bench

    return 1e3 * float(do_bench(call, warmup=20, rep=100, return_mode="median"))
