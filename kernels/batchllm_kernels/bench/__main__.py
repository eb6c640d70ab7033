"""`python -m batchllm_kernels.bench`: needs numpy, torch and Triton, nothing else of this project's dependencies."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

Report = dict[str, Any]

ARCHITECTURES = ("sm80", "sm90")
HEAD_SIZES = (64, 80, 96, 128, 256)


def main(arguments: list[str] | None = None) -> int:
    """Runs one benchmark and prints its report; 1 when a result was wrong, 2 when the device is missing."""
    parser = argparse.ArgumentParser(prog="python -m batchllm_kernels.bench", description=__doc__)
    modes = parser.add_mutually_exclusive_group(required=True)
    modes.add_argument("--model", action="store_true", help="byte counts of every workload shape; needs no device")
    modes.add_argument("--graph", action="store_true", help="launches of captured decode steps; needs no device")
    modes.add_argument("--plan", action="store_true", help="host time of a work plan; needs no device")
    modes.add_argument("--compile", action="store_true", help="registers, shared memory and spills; needs no device")
    modes.add_argument("--device", choices=["cuda"], help="measure the grid, correctness first")
    modes.add_argument("--calibrate", action="store_true", help="measure what the cost gate needs, print its entry")
    modes.add_argument("--tune", action="store_true", help="search launch parameters, print the table's entries")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="fewer points")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a KV block, for --model")
    options = parser.parse_args(arguments)
    if options.model:
        from batchllm_kernels.bench.byte_model import model_report

        return _print(model_report(options.block_size), options.json)
    if options.graph:
        from batchllm_kernels.bench.graph_model import graph_report

        return _print(graph_report(), options.json)
    if options.plan:
        return _print(_plan(), options.json)
    if options.compile:
        return _print(_compile(quick=options.quick), options.json)
    measured: Callable[[bool], Report] = _tune if options.tune else _calibrate if options.calibrate else _measure
    return _on_device(measured, quick=options.quick, as_json=options.json)


def _on_device(measured: Callable[[bool], Report], *, quick: bool, as_json: bool) -> int:
    import torch

    from batchllm_kernels.bench.measure import WrongResultError

    if not torch.cuda.is_available():
        sys.stderr.write("device: expected a CUDA device, got none\n")
        return 2
    try:
        report = measured(quick)
    except WrongResultError as error:
        sys.stderr.write(f"wrong result, no figures: {error}\n")
        return 1
    return _print(report, as_json)


def _plan() -> Report:
    from batchllm_kernels.bench.plan_time import plan_times

    return {"kind": "measured on the host", "rows": [asdict(one) for one in plan_times()]}


def _compile(*, quick: bool) -> Report:
    import torch
    import triton

    from batchllm_kernels.attention.ahead_of_time import compile_kernels

    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32)
    rows = []
    for architecture in ARCHITECTURES:
        for head_size in (64, 128, 256) if quick else HEAD_SIZES:
            for dtype in dtypes:
                for heads in (8,) if quick else (1, 4, 8):
                    shape = {"heads_per_kv_head": heads, "head_size": head_size, "dtype": str(dtype)}
                    kernels = compile_kernels(
                        architecture, heads=8 * heads, kv_heads=8, head_size=head_size, block_size=16, dtype=dtype
                    )
                    rows += [{**asdict(kernel), **shape} for kernel in kernels]
    return {"kind": "compiled ahead of time", "triton": triton.__version__, "rows": rows}


def _measure(quick: bool) -> Report:
    import torch

    from batchllm_kernels.bench.measure import (
        SHARED,
        copy_bytes_per_second,
        device_timer,
        issue_grid,
        matmul_flops_per_second,
        measure_point,
    )

    device = torch.device("cuda")
    bandwidth = copy_bytes_per_second(device)
    rows = []
    for point in issue_grid(quick=quick):
        one = measure_point(point, device, device_timer, torch.bfloat16)
        rows.append(
            {
                **asdict(point),
                "requests": one.requests,
                "relative_error": one.error,
                "microseconds": one.microseconds,
                "fastest_other": one.best_other,
                "speedup": one.speedup,
                "modelled_speedup": one.stock.bytes_moved / one.shared.bytes_moved,
                "share_of_copy_bandwidth": one.minimum_bytes / (one.microseconds[SHARED] / 1e6) / bandwidth,
            }
        )
    return {
        **_device_facts(),
        "copy_bytes_per_second": bandwidth,
        "matmul_flops_per_second": matmul_flops_per_second(device),
        "rows": rows,
    }


def _calibrate(quick: bool) -> Report:
    import torch

    from batchllm_kernels.bench.fit import fit_calibration
    from batchllm_kernels.bench.measure import device_timer, issue_grid, matmul_flops_per_second, measure_point

    device = torch.device("cuda")
    measured = [measure_point(point, device, device_timer, torch.bfloat16) for point in issue_grid(quick=quick)]
    facts = _device_facts()
    source = f"measured with torch {facts['torch']}, triton {facts['triton']}"
    calibration = fit_calibration(source, measured, matmul_flops_per_second(device))
    return {**facts, "calibration.json": {facts["device"]: asdict(calibration)}, "rows": []}


def _tune(quick: bool) -> Report:
    import torch

    from batchllm_kernels.attention.tuning import device_architecture
    from batchllm_kernels.bench.measure import device_timer
    from batchllm_kernels.bench.tune import best_tuning

    device = torch.device("cuda")
    entries = {}
    for head_size in (128,) if quick else (64, 128, 256):
        tuning, _ = best_tuning(head_size, torch.bfloat16, device, device_timer, quick=quick)
        entries[str(head_size)] = asdict(tuning)
    return {**_device_facts(), "tuning.json": {device_architecture(device): {"16 bits": entries}}, "rows": []}


def _device_facts() -> Report:
    import torch
    import triton

    return {
        "kind": "measured",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }


def _print(report: Report, as_json: bool) -> int:
    if as_json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
        return 0
    for name, value in report.items():
        if name != "rows":
            sys.stdout.write(f"{name}: {value}\n")
    for row in report["rows"]:
        sys.stdout.write("  ".join(f"{name}={_short(value)}" for name, value in row.items()) + "\n")
    return 0


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
