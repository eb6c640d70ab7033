"""The stages of a run on a device; each adds to a file of results, and goes on where an earlier run ended."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from batchllm_kernels.attention.tuning import device_architecture
from batchllm_kernels.bench import tune
from batchllm_kernels.bench.calibrate import calibrated
from batchllm_kernels.bench.check import check, check_cases
from batchllm_kernels.bench.grid import GridPoint
from batchllm_kernels.bench.host_time import host_rows
from batchllm_kernels.bench.measure import MeasuredPoint, measure_point
from batchllm_kernels.bench.profiling import run_once
from batchllm_kernels.bench.replay import replay_row
from batchllm_kernels.bench.report import missed_points
from batchllm_kernels.bench.results import ResultsFile, Row, Scope
from batchllm_kernels.bench.setup import Setup
from batchllm_kernels.bench.timers import copy_bytes_per_second, matmul_flops_per_second

REHEARSED_COPY, REHEARSED_MATMUL = 2**20, 64
REPLAYED = (GridPoint(2000, 16, requests=256), GridPoint(2000, 1, requests=64), GridPoint(256, 8, own=40, requests=512))


def device_facts() -> Row:
    """Device and versions."""
    import triton

    cuda = torch.cuda.is_available()
    facts: Row = {
        "device": torch.cuda.get_device_name() if cuda else "none, Triton's interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_gb"] = properties.total_memory / 1e9
        facts["l2_mb"] = getattr(properties, "L2_cache_size", 0) / 1e6
    return facts


def facts_stage(setup: Setup, results: ResultsFile, scope: Scope) -> bool:
    """Device, versions, the rates of copies and of matrix products."""

    def result(key: str) -> Row:
        if key == "device":
            return device_facts()
        if key == "copy":
            return {"bytes_per_second": copy_bytes_per_second(setup.device, **_sized(setup, REHEARSED_COPY))}
        return {"flops_per_second": matmul_flops_per_second(setup.device, **_sized(setup, REHEARSED_MATMUL))}

    return results.collect(["device", "copy", "matmul"], result, scope)


def host_stage(setup: Setup, results: ResultsFile, scope: Scope) -> bool:
    """The host's time of our calls, on a CUDA device with real launches too."""
    return results.collect(["host"], lambda _: {"rows": host_rows(setup.device)}, scope)


def check_stage(setup: Setup, results: ResultsFile, scope: Scope) -> bool:
    """Every kernel against the reference."""
    cases = {case.name: case for case in check_cases(quick=scope.quick or setup.rehearsal)}
    return results.collect(list(cases), lambda name: check(cases[name], setup.device, setup.flash_attention_3), scope)


def time_stage(setup: Setup, results: ResultsFile, scope: Scope, *, important: bool) -> bool:
    """Points of the grid, every implementation checked and then timed."""
    points = {point.key: point for point in setup.points(important=important)}
    bandwidth = _copy_rate(results, setup)

    def result(key: str) -> Row:
        measured = measure_point(
            points[key], setup.device, setup.timer, setup.dtype, setup.flash_attention_3, setup.layers
        )
        _release(setup)
        return measured.row(bandwidth)

    return results.collect(list(points), result, scope, marker="time-important" if important else None)


def profile_stage(setup: Setup, results: ResultsFile, scope: Scope, *, most: int) -> bool:
    """One run of the timed points that miss their goal by most, under a profiler."""
    points = {point.key: point for point in missed_points(results.of_stage("time").rows(), most)}

    def result(key: str) -> Row:
        run_once(setup, points[key])
        _release(setup)
        return {}

    return results.collect(list(points), result, scope)


def replay_stage(setup: Setup, results: ResultsFile, scope: Scope) -> bool:
    """Captured steps, replayed with changed plans."""
    points = {point.key: point for point in (setup.points(important=True) if setup.rehearsal else REPLAYED)}
    return results.collect(list(points), lambda key: replay_row(setup, points[key]), scope)


def compile_candidates_stage(setup: Setup, results: ResultsFile, scope: Scope) -> bool:
    """Every candidate compiled and right, in several processes: the stage `tune` then only measures."""
    candidates = tune.candidates(setup, quick=scope.quick)
    return results.collect(list(candidates), lambda key: tune.compiled(setup, candidates[key]), scope)


def tune_stage(setup: Setup, results: ResultsFile, scope: Scope) -> bool:
    """Launch parameters of each kernel, the likely ones first, and the entry of `tuning.json` that they give."""
    candidates = tune.candidates(setup, quick=scope.quick)
    whole = results.collect(list(candidates), lambda key: tune.measured(setup, candidates[key]), scope)
    results.of_stage("best").add("tuning.json", entry=best_tuning(results, setup))
    return whole


def calibrate_stage(setup: Setup, results: ResultsFile, scope: Scope) -> bool:
    """The entry of `calibration.json` that the measured points give; the important points are measured before."""
    time_stage(setup, results.of_stage("time"), scope, important=True)
    return results.collect(["calibration.json"], lambda _: {"entry": calibration(results, setup)}, Scope())


def calibration(results: ResultsFile, setup: Setup) -> dict[str, Any]:
    """The entry of `calibration.json` that the measured points give.

    Raises:
        ValueError: when they are too few.
    """
    facts = device_facts()
    source = f"measured with torch {facts['torch']}, triton {facts['triton']}"
    points = [MeasuredPoint.of_row(row) for row in results.of_stage("time").rows()]
    known = results.of_stage("host").rows()
    host = known[0]["rows"] if known else host_rows(setup.device)
    return {facts["device"]: asdict(calibrated(source, points, host, setup.device, setup.dtype))}


def best_tuning(results: ResultsFile, setup: Setup) -> dict[str, Any]:
    """The entry of `tuning.json` that the measured candidates give.

    Raises:
        ValueError: when a kernel has none.
    """
    bits = f"{8 * setup.dtype.itemsize} bits"
    entry = tune.best(results.of_stage("tune").rows())
    return {device_architecture(setup.device): {bits: {str(GridPoint(0, 1).head_size): entry}}}


def _copy_rate(results: ResultsFile, setup: Setup) -> float:
    for row in results.of_stage("facts").rows():
        if row["key"] == "copy":
            return float(row["bytes_per_second"])
    return copy_bytes_per_second(setup.device, **_sized(setup, REHEARSED_COPY))


def _sized(setup: Setup, size: int) -> dict[str, int]:
    return {"size": size} if setup.rehearsal else {}


def _release(setup: Setup) -> None:
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
