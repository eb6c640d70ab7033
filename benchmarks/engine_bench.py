"""Runs workloads on the engines of one model in turn, for `engine.py`."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import workloads as shapes
from benchmarks.engine_arguments import BLOCK_SIZE, DEFAULT_BLOCK_SIZES, engine_arguments
from benchmarks.engine_orders import PEAK_CONTEXT, PEAK_REQUESTS, Orders, Rates, orders_of_length
from benchmarks.engine_process import STOCK, EngineProcess
from benchmarks.workloads import Workload

CACHE_SHARE = 0.15
"""The share of the unique tokens that the small KV cache holds."""
BASELINES = ("vllm-default", "vllm-sorted", "vllm-sorted-tuned")
OURS = "batchllm"
MAIN_MODES = ("vllm-sorted-tuned", OURS)
ABLATIONS: dict[str, dict[str, Any]] = {
    "no pins": {"pin_prefixes": False},
    "no lead": {"lead_first": False},
    "no admission": {"admit_by_peak": False},
    "no overtaking": {"overtake": False},
    "no spread ends": {"spread_ends": False},
    "no victim choice": {"cheapest_victim": False},
}
WRONG_ESTIMATES = {"estimates x2": 2.0, "estimates /2": 0.5}
"""Factors on the expected output tokens."""


class Bench:
    """Runs workloads on the engines of one model.

    Args:
        model: folder or Hugging Face id.
        device: `cpu` or `cuda`.
        dtype: of the weights and the KV cache.
        folder: for files.
        eager: no compilation.
    """

    def __init__(self, model: str, device: str, dtype: str, folder: Path, *, eager: bool) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self.eager = eager
        self.folder = folder

    def engine(
        self, *, tuned: bool, cache_tokens: int, longest: int, ours: dict[str, dict[str, Any]] | None = None
    ) -> EngineProcess:
        """Load an engine.

        Args:
            tuned: with our settings.
            cache_tokens: that the KV cache holds; room for the longest request at least.
            longest: tokens of the longest request.
            ours: options of our scheduler by name, each to take turns with vLLM's.
        """
        default_block_size = DEFAULT_BLOCK_SIZES[self.device]
        max_model_len = -(-longest // default_block_size) * default_block_size
        arguments = engine_arguments(
            model=self.model,
            dtype=self.dtype,
            device=self.device,
            eager=self.eager,
            max_model_len=max_model_len,
            cache_tokens=max(cache_tokens, max_model_len),
            block_size=BLOCK_SIZE if tuned else None,
        )
        return EngineProcess(arguments, {STOCK: None, **(ours or {})}, self.folder / "engines.log")

    def orders(self, make: Callable[[float], Workload], seconds: float, rates: Rates) -> Orders:
        """A workload of this shape whose roofline takes about `seconds`."""
        return orders_of_length(make, seconds, rates, self.folder, block_size=BLOCK_SIZE)

    def workload(
        self, orders: Orders, cache_share: float, *, rounds: int, side_rounds: int, ablate: bool
    ) -> dict[str, Any]:
        """Run all modes in turn, every second round backwards, and return the workload's entry of the result.

        Args:
            orders: of the workload.
            cache_share: of the unique tokens, which the KV cache holds.
            rounds: of all modes.
            side_rounds: of vLLM with its own settings, which takes longest, and of what is ablated.
            ablate: run our engine also with one mechanism off, and with wrong estimates.
        """
        cache_tokens = int(orders.unique_tokens * cache_share)
        size = {"cache_tokens": cache_tokens, "longest": orders.longest}
        # A scheduler each, since they learn how far estimates are off.
        variants = {OURS: {}, **(ABLATIONS | {name: {} for name in WRONG_ESTIMATES} if ablate else {})}
        with self.engine(tuned=False, **size) as default, self.engine(tuned=True, **size, ours=variants) as tuned:
            ahead = 2 * tuned.settings["max_num_seqs"]
            planned = orders.planned(ahead=ahead)
            modes: dict[str, tuple[EngineProcess, str, dict[str, Any]]] = {
                "vllm-default": (default, STOCK, orders.given()),
                "vllm-sorted": (default, STOCK, orders.sorted()),
                "vllm-sorted-tuned": (tuned, STOCK, orders.sorted()),
                OURS: (tuned, OURS, planned),
            }
            if ablate:
                for name, factor in WRONG_ESTIMATES.items():
                    modes[name] = (tuned, name, orders.planned(ahead=ahead, estimates=factor))
                modes["sorted, not planned"] = (tuned, OURS, planned | {"rows": orders.sorted()["rows"]})
                modes |= {name: (tuned, name, planned) for name in ABLATIONS}
            results: dict[str, list[dict[str, Any]]] = {name: [] for name in modes}
            for number in range(rounds):
                names = [name for name in modes if name in MAIN_MODES or number < side_rounds]
                for name in names if number % 2 == 0 else reversed(names):
                    engine, scheduler, order = modes[name]
                    # An engine that has waited for its turn finds its memory cold.
                    engine.run(orders.warm_up())
                    results[name].append(engine.run(order, scheduler))
                    log(f"  {name}: {results[name][-1]['seconds']:.1f} s")
        return _summary(orders, cache_tokens, cache_share, results)

    def rates(self) -> Rates:
        """The rates of the tuned engine."""
        out, long, few = 64, 960, 8
        short = PEAK_CONTEXT - out // 2
        made = {
            "prefill": shapes.no_sharing(24, tokens=512, out=1),
            "decode": shapes.no_sharing(PEAK_REQUESTS, tokens=short, out=out),
            "alone": shapes.no_sharing(1, tokens=short, out=out),
            "long prompts": shapes.no_sharing(few, tokens=long, out=1),
            "long contexts": shapes.no_sharing(few, tokens=long, out=out),
        }
        orders = {name: Orders(one, self.folder, block_size=BLOCK_SIZE) for name, one in made.items()}
        with self.engine(tuned=True, cache_tokens=65_536, longest=1024) as engine:
            engine.run(orders["prefill"].warm_up())
            seconds: dict[str, list[float]] = {name: [] for name in orders}
            for _ in range(3):
                for name, one in orders.items():
                    seconds[name].append(engine.run(one.given())["seconds"])
        best = {name: min(runs) for name, runs in seconds.items()}
        prefill_rate = 24 * 512 / best["prefill"]
        together = (best["decode"] - PEAK_REQUESTS * short / prefill_rate) / out
        alone = (best["alone"] - short / prefill_rate) / out
        token = (together - alone) / (PEAK_REQUESTS - 1)
        step = alone - token
        contexts = (best["long contexts"] - best["long prompts"]) / (out - 1) - step - few * token
        return Rates(
            prefill_tokens_per_second=prefill_rate,
            decode_tokens_per_second=PEAK_REQUESTS / together,
            step_seconds=step,
            context_token_seconds=contexts / few / (long - short),
        )

    def logprob_difference(self, orders: Orders) -> dict[str, Any]:
        """How far our answers are from those of vLLM in this dtype, one token after the other until they differ."""
        size = {"cache_tokens": int(orders.unique_tokens * CACHE_SHARE), "longest": orders.longest}
        with self.engine(tuned=True, **size, ours={OURS: {}}) as engine:
            theirs = engine.run(orders.sorted() | {"logprobs": True})
            answered = engine.run(orders.planned(ahead=256) | {"logprobs": True}, OURS)
        differences = []
        for row, tokens in enumerate(answered["answers"]):
            for place, token in enumerate(tokens):
                if token != theirs["answers"][row][place]:
                    break
                differences.append(abs(answered["logprobs"][row][place] - theirs["logprobs"][row][place]))
        same = [one == other for one, other in zip(answered["answers"], theirs["answers"], strict=True)]
        return {
            "dtype": self.dtype,
            "requests": len(same),
            "same_text": round(sum(same) / len(same), 3),
            "tokens_compared": len(differences),
            "logprob_difference_median": round(float(np.median(differences)), 4),
            "logprob_difference_p99": round(float(np.quantile(differences, 0.99)), 4),
            "logprob_difference_max": round(max(differences), 4),
        }


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
            "runs": len(runs),
            "computed_prompt_tokens": computed,
            "saving": round(1 - computed / prompt_tokens, 4),
            "wasted": round((computed - orders.optimum_computed) / orders.unique_tokens, 4),
            "preemptions": runs[0]["preemptions"],
            "steps": runs[0]["steps"],
        }
    same = [
        ours == theirs
        for ours, theirs in zip(results[OURS][0]["answers"], results["vllm-sorted-tuned"][0]["answers"], strict=True)
    ]
    return {
        "workload": workload.name,
        "requests": len(workload),
        "prompt_tokens": prompt_tokens,
        "output_tokens": orders.output_tokens,
        "optimum_computed_prompt_tokens": orders.optimum_computed,
        "cache_share": cache_share,
        "cache_tokens": cache_tokens,
        "modes": modes,
        "ratios": {name: round(modes[name]["seconds"] / modes[OURS]["seconds"], 3) for name in BASELINES},
        "same_text_as_tuned": round(sum(same) / len(same), 3),
    }


def log(text: str) -> None:
    """Tell people; results go to standard output."""
    print(text, file=sys.stderr, flush=True)
