"""Prefix-shared attention against vLLM's own, inside vLLM on a GPU: whole generations, and single decode steps.

    python benchmarks/attention_in_vllm.py OUT [--seconds 600] [--quick]

Two engines of each model stand on one GPU and take turns, so that both see the same machine: one with
`model.attention` `stock`, one with `shared`; both with our scheduler and the same plan, and the stock one also with
vLLM's scheduler. OUT gets `results.jsonl`, a line for each run, written at once, and the engines' logs.

`answers`: a small model with random weights (bf16) must give the same tokens with both, but for near ties: bf16 rounds
sums in another order, so what is compared is how often and by how much answers part, beside how often vLLM's own
attention parts from itself where batches are formed otherwise.
`speed`: a Llama of 8B parameters' layers, half as many (16), so that two engines fit on 80 GB with 376,000 KV tokens
each; weights are made up, which changes nothing in time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from batchllm_kernels.vllm_plugin.attention_trace import read_attention_steps
from batchllm_kernels.vllm_plugin.options import ATTENTION_TRACE_VARIABLE
from benchmarks.engine_process import STOCK, EngineProcess
from benchmarks.workloads import VOCABULARY, Workload, no_sharing, shared_prefix

BLOCK_SIZE = 16
OURS = "batchllm"
MODES = {"vLLM": ("stock", STOCK), "stock": ("stock", OURS), "shared": ("shared", OURS)}
"""Name of a mode: attention, scheduler."""

SMALL = {"layers": 4, "hidden": 1024, "heads": 8, "kv_heads": 2, "vocabulary": VOCABULARY}
HALF_OF_8B = {"layers": 16, "hidden": 4096, "heads": 32, "kv_heads": 8, "vocabulary": 128_256}

Run = dict[str, Any]


def model_config(*, layers: int, hidden: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    """The `config.json` of a Llama with heads of 128 numbers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32_768,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "initializer_range": 0.05,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }


def write_model(folder: Path, config: dict[str, Any], *, weights: bool) -> str:
    """A model's folder, with random weights or none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if weights:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


class Engines:
    """An engine for each kind of attention, loaded at the same time.

    Args:
        model: folder of the model.
        folder: for logs, traces and prompts.
        arguments: of vLLM's `EngineArgs`, beside those that all engines here have.
        stack: closes the engines.
    """

    def __init__(self, model: str, folder: Path, arguments: dict[str, Any], stack: ExitStack) -> None:
        self._folder = folder
        self._traced = 0
        arguments = {
            "model": model,
            "skip_tokenizer_init": True,
            "block_size": BLOCK_SIZE,
            "enable_prefix_caching": True,
            **arguments,
        }

        def start(attention: str) -> EngineProcess:
            return EngineProcess(
                arguments,
                {STOCK: None, OURS: {}},
                folder / f"{Path(model).name}-{attention}.log",
                attention=attention,
                environment={ATTENTION_TRACE_VARIABLE: str(self._trace)} if attention == "shared" else {},
            )

        with ThreadPoolExecutor(2) as threads:
            loading = {attention: threads.submit(start, attention) for attention in ("stock", "shared")}
            self._engines = {attention: stack.enter_context(one.result()) for attention, one in loading.items()}

    @property
    def _trace(self) -> Path:
        return self._folder / "attention.jsonl"

    @property
    def settings(self) -> dict[str, Any]:
        """What each engine says of itself."""
        return {attention: engine.settings for attention, engine in self._engines.items()}

    def run(self, mode: str, order: dict[str, Any]) -> Run:
        """One run of a mode; `shared_steps` of a shared one: the share of its steps in which attention was shared."""
        attention, scheduler = MODES[mode]
        run = self._engines[attention].run(order, scheduler)
        if attention == "shared":
            steps, self._traced = read_attention_steps(self._trace, self._traced)
            run["shared_steps"] = sum(step["share"] for step in steps) / max(len(steps), 1)
        return run


def order_of(workload: Workload, folder: Path, *, logprobs: bool) -> dict[str, Any]:
    """A workload in the order of its groups, with what a plan says of each request."""
    tokens, offsets = workload.prompts()
    file = folder / f"{workload.name.replace(' ', '-')}.npz"
    np.savez(file, tokens=tokens, offsets=offsets)
    shared = workload.piece.shape[1] > 1
    groups, prefixes = workload.piece[:, 0], workload.length[:, 0] // BLOCK_SIZE * BLOCK_SIZE * shared
    return {
        "prompts": str(file),
        "rows": np.argsort(groups, kind="stable").tolist(),
        "output_tokens": workload.output_tokens.tolist(),
        "plan": [
            [str(group), int(prefix), int(output)]
            for group, prefix, output in zip(groups, prefixes, workload.output_tokens, strict=True)
        ],
        "ahead": None,
        "logprobs": logprobs,
    }


def compared(run: Run, other: Run) -> dict[str, Any]:
    """How far the answers of two runs are the same, and how far apart the logprobs of what both chose are.

    `parting_gap_most`: the largest difference between the logprobs of the two tokens where answers part. Both are the
    best of their run, so that a near tie has a small one.
    """
    equal, gaps, partings, common = 0, [], [], 0
    for row, (one, two) in enumerate(zip(run["answers"], other["answers"], strict=True)):
        same = next((at for at, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), len(one))
        equal += same == len(one)
        common += same
        apart = [abs(a - b) for a, b in zip(run["logprobs"][row], other["logprobs"][row], strict=True)]
        gaps += apart[:same]
        partings += apart[same : same + 1]
    return {
        "equal_answers": equal / len(run["answers"]),
        "common_tokens": common / sum(map(len, run["answers"])),
        "logprob_gap_median": float(np.median(gaps)) if gaps else None,
        "logprob_gap_p99": float(np.quantile(gaps, 0.99)) if gaps else None,
        "parting_gap_most": max(partings, default=None),
    }


class Bench:
    """The two stages; a line of `results.jsonl` for each thing that was seen.

    Args:
        folder: for results, models and logs.
        seconds: begin nothing new after so many.
        quick: small shapes, to see that it runs.
        arguments: of vLLM's `EngineArgs`, for every engine.
    """

    def __init__(self, folder: Path, seconds: float, *, quick: bool, arguments: dict[str, Any]) -> None:
        self._folder = folder
        self._end = time.monotonic() + seconds
        self._quick = quick
        self._arguments = arguments

    def answers(self) -> None:
        """Whether a small model gives the same answers."""
        sizes = {"requests": 64, "groups": 4} if self._quick else {"requests": 512, "groups": 16}
        workload = shared_prefix("answers", **sizes, prefix=1000, own=40, out=32)
        order = order_of(workload, self._folder, logprobs=True)
        with self._engines(
            "small", SMALL, weights=True, max_model_len=2048, max_num_seqs=512, kv_bytes=2**30
        ) as engines:
            runs = {mode: engines.run(mode, order) for mode in MODES}
        shared = runs["shared"]
        self._tell({"stage": "answers", "against": "vLLM", "mode": "stock", **compared(runs["stock"], runs["vLLM"])})
        self._tell({"stage": "answers", "against": "stock", "mode": "shared", **compared(shared, runs["stock"])})
        self._tell({"stage": "answers", "shared_steps": shared["shared_steps"]})

    def speed(self, rounds: int) -> None:
        """What shared attention is worth to whole generations of a model's size that pays for a GPU."""
        workloads: dict[str, Callable[[], Workload]] = {
            "2,000 x 16": lambda: shared_prefix("speed-2000", 1024, 64, prefix=2000, own=100, out=150),
            "16,000 x 64": lambda: shared_prefix("speed-16000", 1024, 16, prefix=16_000, own=100, out=40),
            "nothing shared": lambda: no_sharing(256, tokens=1000, out=150),
        }
        with self._engines(
            "half-8b", HALF_OF_8B, weights=False, max_model_len=16_400, max_num_seqs=1024, kv_bytes=23 * 2**30
        ) as engines:
            orders = {name: order_of(make(), self._folder, logprobs=False) for name, make in workloads.items()}
            for mode in ("stock", "shared"):
                engines.run(mode, orders["2,000 x 16"])  # kernels, memory pools and caches of the first run
            for number in range(rounds):
                for name, order in orders.items():
                    for mode in MODES if number % 2 == 0 else reversed(MODES):
                        if time.monotonic() > self._end:
                            return
                        run = engines.run(mode, order)
                        kept = {key: value for key, value in run.items() if key not in {"answers", "logprobs"}}
                        self._tell({"stage": "speed", "workload": name, "mode": mode, "round": number, **kept})

    @contextmanager
    def _engines(
        self, name: str, shape: dict[str, int], *, weights: bool, max_model_len: int, max_num_seqs: int, kv_bytes: int
    ) -> Iterator[Engines]:
        model = write_model(self._folder / "models" / name, model_config(**shape), weights=weights)
        arguments = {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_cudagraph_capture_size": max_num_seqs,
            # Told and not measured by vLLM, because each engine would take what the other one just takes for its own.
            "kv_cache_memory_bytes": kv_bytes,
            "gpu_memory_utilization": 0.45,
            **({} if weights else {"load_format": "dummy"}),
            **self._arguments,
        }
        with ExitStack() as stack:
            started = time.monotonic()
            engines = Engines(model, self._folder, arguments, stack)
            self._tell({"stage": "load", "model": name, "seconds": time.monotonic() - started, **engines.settings})
            yield engines

    def _tell(self, line: dict[str, Any]) -> None:
        with (self._folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def main(arguments: list[str] | None = None) -> None:
    """Runs both stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for results and logs")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin nothing new after so many")
    parser.add_argument("--rounds", type=int, default=3, help="of each workload and mode")
    parser.add_argument("--quick", action="store_true", help="few requests for the answers")
    parser.add_argument("--stage", choices=["answers", "speed"], help="only this")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="vLLM's EngineArgs, a JSON object")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.out, options.seconds, quick=options.quick, arguments=options.engine_args)
    if options.stage != "speed":
        bench.answers()
    if options.stage != "answers":
        bench.speed(options.rounds)


if __name__ == "__main__":
    main()
