"""Our engine answers like vLLM, token for token: float32, greedy, a small random model, real engine processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchllm_kernels.vllm_plugin.options import PlannedRequest
from benchmarks.engine_process import EngineProcess
from tests.vllm_plugin.driven_scheduler import Ask, optimum

pytestmark = pytest.mark.engine


@dataclass(frozen=True)
class Setting:
    """An engine, and the blocks of prefixes that suit it."""

    block_size: int
    cache_blocks: int
    max_model_len: int
    arguments: dict[str, Any]


# vLLM's attention on CPUs takes blocks of multiples of 32 tokens.
SETTINGS = [
    Setting(32, 17, 512, {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 24, "async_scheduling": False}),
    Setting(64, 16, 512, {"max_num_batched_tokens": 96, "async_scheduling": True}),
    Setting(128, 10, 1024, {"max_num_batched_tokens": 512}),
]


class Prompts:
    """Random tokens, no two runs of them alike."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._generator = np.random.default_rng(5)

    def tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._generator.integers(10, 49_000, count).tolist())

    def blocks(self, count: int) -> tuple[int, ...]:
        return self.tokens(count * self._setting.block_size)

    def ask(self, prefix: tuple[int, ...], group: str, output_tokens: int) -> Ask:
        prompt = prefix + self.tokens(int(self._generator.integers(1, 40)))
        return Ask(prompt, output_tokens, PlannedRequest(group, len(prefix), output_tokens))

    def sharing(self) -> list[Ask]:
        prefixes = [self.blocks(2) for _ in range(3)]
        return [self.ask(prefix, f"{index}", 6) for index, prefix in enumerate(prefixes) for _ in range(5)]

    def two_levels(self) -> list[Ask]:
        trees = [(f"{root}/{child}", parent) for root in range(2) for parent in [self.blocks(1)] for child in range(2)]
        groups = [(name, parent + self.blocks(1)) for name, parent in trees]
        return [self.ask(prefix, name, 5) for name, prefix in groups for _ in range(3)]

    def ragged(self) -> list[Ask]:
        longest = 3 * self._setting.block_size
        outputs = [4 + int(index) * longest // 14 for index in self._generator.permutation(14)]
        return [self.ask((), f"{index}", output) for index, output in enumerate(outputs)]

    def equal(self) -> list[Ask]:
        prompt = self.blocks(2)
        return [Ask(prompt, 9, PlannedRequest("equal", len(prompt), 9)) for _ in range(6)]


VLLMS, OURS = "vllm", "batchllm"


class Engine:
    """A worker of the benchmark, spoken to in `Ask`s."""

    def __init__(self, process: EngineProcess, folder: Path, scheduler: str) -> None:
        self._process = process
        self._folder = folder
        self._scheduler = scheduler

    def run(
        self, asks: list[Ask], expected_output_tokens: int | None = None, ahead: int | None = None
    ) -> dict[str, Any]:
        """Answer these, with their own estimates or one for all."""
        np.savez(
            self._folder / "prompts.npz",
            tokens=np.concatenate([ask.prompt for ask in asks]),
            offsets=np.cumsum([0, *(len(ask.prompt) for ask in asks)]),
        )
        plan = [
            (ask.planned.group, ask.planned.prefix_tokens, expected_output_tokens or ask.output_tokens)
            for ask in asks
            if ask.planned
        ]
        order = {
            "prompts": str(self._folder / "prompts.npz"),
            "rows": list(range(len(asks))),
            "output_tokens": [ask.output_tokens for ask in asks],
            "plan": plan,
            "ahead": ahead,
            "logprobs": False,
        }
        return self._process.run(order, self._scheduler)


@contextmanager
def engines(model: str, setting: Setting, folder: Path) -> Iterator[tuple[Engine, Engine]]:
    """One engine with vLLM's scheduler, and with ours: they take turns on one KV cache, which is emptied between."""
    arguments = {
        "model": model,
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 2**27,
        "num_gpu_blocks_override": setting.cache_blocks,
        "block_size": setting.block_size,
        "max_model_len": setting.max_model_len,
        "max_num_seqs": 32,
        **setting.arguments,
    }
    with EngineProcess(arguments, {VLLMS: None, OURS: {}}, folder / "engine.log") as process:
        yield Engine(process, folder, VLLMS), Engine(process, folder, OURS)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: f"blocks of {setting.block_size}")
def test_every_answer_is_vllms_token_for_token(tiny_llama: str, setting: Setting, tmp_path: Path) -> None:
    prompts = Prompts(setting)
    workloads = {
        "sharing": prompts.sharing(),
        "two levels": prompts.two_levels(),
        "ragged": prompts.ragged(),
        "equal": prompts.equal(),
    }
    with engines(tiny_llama, setting, tmp_path) as (vllm, ours):
        expected = {name: vllm.run(asks) for name, asks in workloads.items()}
        assert expected["ragged"]["preemptions"] > 0, "expected a cache so tight that vLLM preempts"
        for name, asks in workloads.items():
            planned = ours.run(asks)
            assert planned["answers"] == expected[name]["answers"], name
            assert planned["preemptions"] == 0, name
            assert planned["computed_prompt_tokens"] == optimum([ask.prompt for ask in asks], setting.block_size), name
            fed_slowly = ours.run(asks, ahead=3)
            assert fed_slowly["answers"] == expected[name]["answers"], name
        too_low = ours.run(workloads["ragged"], expected_output_tokens=1)
        assert too_low["preemptions"] > 0
        assert too_low["answers"] == expected["ragged"]["answers"]
        too_high = ours.run(workloads["sharing"], expected_output_tokens=500)
        assert too_high["answers"] == expected["sharing"]["answers"]
