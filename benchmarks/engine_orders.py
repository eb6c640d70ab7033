"""One workload as the orders that the modes of `engine.py` give to their engines."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from batchllm_operators.plan.block_hashes import hash_blocks
from batchllm_operators.plan.planning import plan_requests
from batchllm_operators.specs.planning import PlanningSpec
from batchllm_operators.store import Store
from benchmarks.staged import stage
from benchmarks.workloads import Workload

WARM_UP_REQUESTS = 3
PEAK_REQUESTS = 128
"""Requests that generate together when the peak rate is measured."""
PEAK_CONTEXT = 64
"""Tokens that each of them has in the cache, on average."""


@dataclass(frozen=True)
class Rates:
    """The rates of one engine, measured."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    """At its peak."""
    step_seconds: float
    """The seconds of a step that generates, beyond what its tokens cost."""
    context_token_seconds: float
    """What each token that a request has in the cache adds to each token that it generates."""

    @property
    def output_token_seconds(self) -> float:
        """What each generated token adds to a step, beyond its context."""
        at_peak = 1 / self.decode_tokens_per_second - self.step_seconds / PEAK_REQUESTS
        return at_peak - PEAK_CONTEXT * self.context_token_seconds


class Orders:
    """What an engine is told to run: a JSON object for `engine_worker.Worker.run`.

    Args:
        workload: the requests.
        folder: for files.
        block_size: tokens of a KV block, of the plan.

    Attributes:
        optimum_computed: prompt tokens that an ideal cache which never evicts leaves to compute.
        own_context_tokens: tokens that are read from the KV cache to generate, those of shared blocks not counted.
    """

    def __init__(self, workload: Workload, folder: Path, *, block_size: int) -> None:
        self.workload = workload
        tokens, offsets = workload.prompts()
        file = folder / f"{workload.name.replace(' ', '-')}-{len(workload)}.npz"
        np.savez(file, tokens=tokens, offsets=offsets)
        prompts = [tokens[offsets[row] : offsets[row + 1]] for row in range(len(workload))]
        self._common = {"prompts": str(file), "output_tokens": workload.output_tokens.tolist(), "logprobs": False}
        self._sorted = sorted(range(len(workload)), key=lambda row: prompts[row].tolist())
        self._planned, self._plan, self.optimum_computed = _plan(workload, folder, block_size)
        self._token_steps, self.own_context_tokens = _token_steps(workload, block_size)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its completion."""
        return int((self.workload.prompt_tokens + self.workload.output_tokens).max())

    @property
    def output_tokens(self) -> int:
        """The output tokens of all requests."""
        return int(self.workload.output_tokens.sum())

    @property
    def unique_tokens(self) -> int:
        """Tokens whose KV an ideal cache holds in the end: distinct prompt blocks and all completions."""
        return self.optimum_computed + self.output_tokens

    def fewest_steps(self, cache_tokens: int) -> int:
        """Steps that generate, of which no schedule has fewer with a KV cache of this size."""
        return max(-(-self._token_steps // cache_tokens), int(self.workload.output_tokens.max()))

    def warm_up(self) -> dict[str, Any]:
        """A few rows, to be run before what is measured."""
        return self.given() | {"rows": list(range(min(WARM_UP_REQUESTS, len(self.workload))))}

    def given(self) -> dict[str, Any]:
        """In the order of the dataset."""
        return self._common | {"rows": list(range(len(self.workload))), "plan": None, "ahead": None}

    def sorted(self) -> dict[str, Any]:
        """In the order of the prompts' tokens."""
        return self._common | {"rows": self._sorted, "plan": None, "ahead": None}

    def planned(self, *, ahead: int, estimates: float = 1.0) -> dict[str, Any]:
        """In the plan's order.

        Args:
            ahead: requests fed ahead of the engine.
            estimates: factor that the expected output tokens are off by.
        """
        plan = [[group, prefix, max(round(expected * estimates), 1)] for group, prefix, expected in self._plan]
        return self._common | {"rows": self._planned, "plan": plan, "ahead": ahead}


def orders_of_length(
    make: Callable[[float], Workload], seconds: float, rates: Rates, folder: Path, *, block_size: int
) -> Orders:
    """A workload whose roofline is about `seconds` at these rates.

    Args:
        make: makes the workload from a factor on the number of its requests.
        seconds: of the roofline.
        rates: of the engine.
        folder: for files.
        block_size: tokens of a KV block.
    """
    factor = 0.25
    for _ in range(2):
        orders = Orders(make(factor), folder, block_size=block_size)
        factor *= seconds / roofline_seconds(orders, rates)
    return Orders(make(factor), folder, block_size=block_size)


def roofline_seconds(orders: Orders, rates: Rates) -> float:
    """Seconds for each distinct prompt block once, at the peak rate of prefill, and each output token, at decode's."""
    prefill = orders.optimum_computed / rates.prefill_tokens_per_second
    return prefill + orders.output_tokens / rates.decode_tokens_per_second


def floor_seconds(orders: Orders, rates: Rates, cache_tokens: int) -> float:
    """As the roofline, but steps cost what they cost however few requests run, and so do contexts that are not shared.

    What is shared may stay in the caches of a processor, and prefix-shared attention reads it once for all.
    """
    prefill = orders.optimum_computed / rates.prefill_tokens_per_second
    return prefill + sum(decode_seconds(orders, rates, orders.fewest_steps(cache_tokens)).values())


def decode_seconds(orders: Orders, rates: Rates, steps: int) -> dict[str, float]:
    """What it costs to generate all outputs in this many steps, by cause."""
    return {
        "steps": steps * rates.step_seconds,
        "output tokens": orders.output_tokens * rates.output_token_seconds,
        "own contexts": orders.own_context_tokens * rates.context_token_seconds,
    }


def _token_steps(workload: Workload, block_size: int) -> tuple[int, int]:
    """Room in the cache that any schedule needs, in tokens times steps, and `own_context_tokens`.

    A request keeps its prompt while it generates, and its output so far, in whole blocks. Full blocks that several
    requests begin with are kept once, for as long as the longest of them generates.
    """
    hashes = hash_blocks(*workload.prompts(), block_size)
    steps = np.repeat(workload.output_tokens.astype(np.int64), hashes.blocks)
    _, block, uses = np.unique(hashes.lanes, axis=0, return_inverse=True, return_counts=True)
    kept = np.zeros(len(uses), dtype=np.int64)
    np.maximum.at(kept, block, steps)
    # What follows the full blocks of each prompt, in each step that generates.
    tails = [
        prompt % block_size + np.arange(output)
        for prompt, output in zip(workload.prompt_tokens, workload.output_tokens, strict=True)
    ]
    own_blocks = sum(int((-(-tail // block_size)).sum()) for tail in tails)
    read = sum(int(tail.sum()) for tail in tails) + block_size * int(steps[uses[block] == 1].sum())
    return block_size * (own_blocks + int(kept.sum())), read


def _plan(workload: Workload, folder: Path, block_size: int) -> tuple[list[int], list[tuple[str, int, int]], int]:
    """Rows in the plan's order; group, prefix and expected output by row; prompt tokens of the block-exact optimum."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        work = Store(place)
        # The exact length as max_tokens, which the plan takes for its estimate.
        staged = stage(work, replace(workload, max_tokens=workload.output_tokens), key_by_row=True)
        summary = plan_requests(work, staged, PlanningSpec(block_size=block_size))
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
    return order, plan, round(staged.prompt_tokens * (1 - summary.saving.optimum))
