"""`python -m batchllm_kernels.bench`: needs numpy, torch and Triton, nothing else of this project's dependencies."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

Report = dict[str, Any]

ARCHITECTURES = ("sm80", "sm90", "sm100")
HEAD_SIZES = (64, 80, 96, 128, 256)
QUICK_HEAD_SIZES = {"sm80": (64, 256), "sm90": (64, 128, 256), "sm100": (128,)}
PROFILED_POINTS = 4
STAGES = ("facts", "check", "host", "calibrate", "compile_candidates", "tune", "replay", "profile")


def main(arguments: list[str] | None = None) -> int:
    """Runs one benchmark and prints its report.

    Returns:
        1 when a result was wrong or failed, 2 when the device is missing, 3 when the time was over before the end.
    """
    parser = argparse.ArgumentParser(prog="python -m batchllm_kernels.bench", description=__doc__)
    modes = parser.add_mutually_exclusive_group(required=True)
    modes.add_argument("--model", action="store_true", help="byte counts of every workload shape; needs no device")
    modes.add_argument("--graph", action="store_true", help="launches of captured decode steps; needs no device")
    modes.add_argument("--plan", action="store_true", help="host time of a work plan; needs no device")
    modes.add_argument("--host", action="store_true", help="host time of a layer's call and of a step; needs no device")
    modes.add_argument("--compile", action="store_true", help="registers, shared memory and spills; needs no device")
    modes.add_argument("--summary", action="store_true", help="a table of --results; needs no device")
    modes.add_argument("--facts", action="store_true", help="device, versions, rates of copies and products")
    modes.add_argument("--check", action="store_true", help="every kernel against the reference, on odd shapes")
    modes.add_argument("--device", choices=["cuda"], help="measure the grid, correctness first")
    modes.add_argument("--calibrate", action="store_true", help="measure what the cost gate needs, print its entry")
    modes.add_argument("--tune", action="store_true", help="search launch parameters, print the table's entries")
    modes.add_argument(
        "--compile-candidates", action="store_true", help="compile what --tune tries, several processes with --part"
    )
    modes.add_argument("--replay", action="store_true", help="captured steps, replayed with changed plans")
    modes.add_argument("--profile", action="store_true", help="run the points of --results that miss their goals once")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="fewer points")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a KV block, for --model")
    parser.add_argument("--results", type=Path, help="file of JSON lines to add to, and to go on from")
    parser.add_argument("--seconds", type=float, help="begin nothing new after so long")
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="K/N", help="the cases K, K + N...; K from 0")
    parser.add_argument("--stage-name", help="of the results, where it is not the mode's")
    parser.add_argument("--flash-attention-3", type=Path, help="library of vLLM's wheel, see scripts/fa3_library.py")
    parser.add_argument(
        "--rehearsal", action="store_true", help="tiny shapes in Triton's interpreter; times mean nothing"
    )
    options = parser.parse_args(arguments)
    if options.model:
        from batchllm_kernels.bench.byte_model import model_report

        return _print(model_report(options.block_size), options.json)
    if options.graph:
        from batchllm_kernels.bench.graph_model import graph_report

        return _print(graph_report(), options.json)
    if options.plan:
        return _print(_plan(), options.json)
    if options.host and options.results is None:
        return _print(_host(), options.json)
    if options.compile:
        return _print(_compile(quick=options.quick), options.json)
    if options.summary:
        return _summary(options.results)
    return _on_device(options)


def _part(text: str) -> tuple[int, int]:
    number, parts = map(int, text.split("/"))
    if not 0 <= number < parts:
        raise argparse.ArgumentTypeError(f"expected K/N with 0 <= K < N, got {text}")
    return number, parts


def _summary(results: Path | None) -> int:
    from batchllm_kernels.bench.report import summary

    if results is None or not results.exists():
        sys.stderr.write(f"--results: expected a file of results, got {results}\n")
        return 2
    sys.stdout.write(summary(results))
    return 0


def _on_device(options: argparse.Namespace) -> int:
    import torch

    if not options.rehearsal and not torch.cuda.is_available():
        sys.stderr.write("device: expected a CUDA device, got none\n")
        return 2
    from batchllm_kernels.bench import stages
    from batchllm_kernels.bench.results import Deadline, ResultsFile, Scope
    from batchllm_kernels.bench.setup import cuda_setup, rehearsal_setup

    setup = (rehearsal_setup if options.rehearsal else cuda_setup)(options.flash_attention_3)
    scope = Scope(options.quick, options.part, Deadline(options.seconds))
    name = next((name for name in STAGES if getattr(options, name)), "time")
    results = ResultsFile(options.results, options.stage_name or name)
    if name == "time":
        whole = stages.time_stage(setup, results, scope, important=options.quick)
    elif name == "profile":
        whole = stages.profile_stage(setup, results, scope, most=PROFILED_POINTS)
    else:
        stage: Callable[..., bool] = getattr(stages, f"{name}_stage")
        whole = stage(setup, results, scope)
    return 1 if results.failures else 0 if whole else 3


def _plan() -> Report:
    from batchllm_kernels.bench.plan_time import plan_times

    return {"kind": "measured on the host", "rows": [asdict(one) for one in plan_times()]}


def _host() -> Report:
    import torch

    from batchllm_kernels.bench.host_time import host_rows

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"kind": "measured on the host", "device": str(device), "rows": host_rows(device)}


def _compile(*, quick: bool) -> Report:
    import torch
    import triton

    from batchllm_kernels.attention.ahead_of_time import compile_kernels

    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32)
    rows = []
    for architecture in ARCHITECTURES:
        for head_size in QUICK_HEAD_SIZES[architecture] if quick else HEAD_SIZES:
            for dtype in dtypes:
                for heads in (8,) if quick else (1, 4, 8):
                    shape = {"heads_per_kv_head": heads, "head_size": head_size, "dtype": str(dtype)}
                    kernels = compile_kernels(
                        architecture, heads=8 * heads, kv_heads=8, head_size=head_size, block_size=16, dtype=dtype
                    )
                    rows += [{**asdict(kernel), **shape} for kernel in kernels]
    return {"kind": "compiled ahead of time", "triton": triton.__version__, "rows": rows}


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
