"""One vLLM engine in a process of its own, for `engine.py`: loads, then runs what comes on its standard input.

    python engine_worker.py '{"arguments": {...}, "schedulers": {name: {...} or null}, "attention": "stock"}'

Prints one line with its settings, then for each line of input (a JSON object, see `Worker.run`) one JSON line with what
the run gave. It imports nothing that loads numba: vLLM 0.32 on CPUs does not start then.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import deque
from copy import copy
from itertools import pairwise
from typing import Any

import numpy as np

from batchllm_kernels.vllm_plugin import scheduler_path
from batchllm_kernels.vllm_plugin.options import CONFIG_KEY, PlannedRequest


class Worker:
    """An engine whose steps are counted from inside its scheduler.

    Schedulers take turns on one engine, so that they have the same memory: two processes of the same engine differ by
    up to 10 % in speed.

    Args:
        arguments: vLLM's `EngineArgs`.
        schedulers: options of our scheduler by name, or None for vLLM's.
        attention: as `model.attention` of a job.
    """

    def __init__(
        self, arguments: dict[str, Any], schedulers: dict[str, dict[str, Any] | None], attention: str = "stock"
    ) -> None:
        # In this process, so that the scheduler can be looked at; on every device and for every mode alike.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        from batchllm_kernels.vllm_plugin.attention_choice import start_with_attention

        def make_config() -> Any:
            return EngineArgs(**arguments, disable_log_stats=True).create_engine_config(UsageContext.LLM_CLASS)

        def start(config: Any) -> Any:
            return LLMEngine.from_vllm_config(config, UsageContext.LLM_CLASS, disable_log_stats=True)

        self.engine, choice = start_with_attention(attention, make_config, start)
        self.config = self.engine.vllm_config
        self.core = self.engine.engine_core.engine_core
        self.settings = {
            name: getattr(self.config.scheduler_config, name)
            for name in ("max_num_seqs", "max_num_batched_tokens", "async_scheduling")
        } | {
            "block_size": self.config.cache_config.block_size,
            "blocks": self.config.cache_config.num_gpu_blocks,
            "attention": str(choice),
            "cudagraph_mode": self.config.compilation_config.cudagraph_mode.name,
        }
        self._start_counting()
        stock = self.core.scheduler
        self.schedulers = {
            name: stock if options is None else self._scheduler(options) for name, options in schedulers.items()
        }
        for scheduler in self.schedulers.values():
            self._count(scheduler)

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """Answer the prompts of a file in the order given; all fed at once, or a bounded queue.

        order: `scheduler` (its name), `prompts` (npz of `tokens`, `offsets`), `rows`, `output_tokens` by row, `plan` by
        row or null: group, prefix tokens, expected output tokens; `ahead`: requests fed ahead of the engine, or null;
        `logprobs`: whether to return those of the tokens that were chosen.
        """
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        with np.load(order["prompts"]) as file:
            tokens, offsets = file["tokens"], file["offsets"]
        requests = [
            (
                str(row),
                tokens_input(tokens[offsets[row] : offsets[row + 1]].tolist()),
                SamplingParams(
                    temperature=0.0,
                    max_tokens=order["output_tokens"][row],
                    ignore_eos=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    logprobs=0 if order["logprobs"] else None,
                    extra_args=PlannedRequest(*order["plan"][row]).as_extra_args() if order["plan"] else None,
                ),
            )
            for row in order["rows"]
        ]
        self.core.scheduler = self.schedulers[order["scheduler"]]
        self.engine.reset_prefix_cache()
        self._start_counting()
        ahead = order["ahead"] or len(requests)
        waiting = deque(requests)
        answers: dict[str, list[int]] = {}
        logprobs: dict[str, list[float]] = {}
        started, cpu_started = time.perf_counter(), time.process_time()
        while waiting or len(answers) < len(requests):
            while waiting and len(requests) - len(waiting) - len(answers) < ahead:
                self.engine.add_request(*waiting.popleft())
            for output in self.engine.step():
                one = output.outputs[0]
                answers[output.request_id] = list(one.token_ids)
                if order["logprobs"]:
                    chosen = zip(one.token_ids, one.logprobs, strict=True)
                    logprobs[output.request_id] = [of_all[token].logprob for token, of_all in chosen]
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        steps = self.steps
        while self.core.scheduler.has_requests():
            self.engine.step()  # tells the model runner which requests have ended
        wrong = [row for row in order["rows"] if len(answers[str(row)]) != order["output_tokens"][row]]
        if wrong:
            raise ValueError(f"rows {wrong[:5]}: expected another number of output tokens")
        outputs = sum(order["output_tokens"][row] - 1 for row in order["rows"])
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            # The first token of an output comes out of the prefill.
            "computed_prompt_tokens": self.computed - outputs,
            "steps": steps,
            "preemptions": self.preemptions,
            "full_decode_step_seconds": self._full_decode_step_seconds(),
            "answers": [answers[str(row)] for row in sorted(order["rows"])],
            "logprobs": [logprobs[str(row)] for row in sorted(order["rows"])] if order["logprobs"] else None,
        }

    def _start_counting(self) -> None:
        self.computed = self.steps = self.preemptions = 0
        self.schedules: list[tuple[float, int, int]] = []
        """When each step was scheduled, its tokens, its requests."""

    def _full_decode_step_seconds(self) -> float | None:
        """The median step that gave a token to each of nearly as many requests as ever ran; None: there is none."""
        most = max(requests for _, _, requests in self.schedules)
        seconds = [
            then - now
            for (now, tokens, requests), (then, later_tokens, later) in pairwise(self.schedules)
            if tokens == requests == later_tokens == later and requests >= 0.9 * most
        ]
        return statistics.median(seconds) if seconds else None

    def _scheduler(self, options: dict[str, Any]) -> Any:
        """Our scheduler, on the KV cache that the engine has."""
        from vllm.utils.import_utils import resolve_obj_by_qualname

        stock, config = self.core.scheduler, copy(self.config)
        config.additional_config = {CONFIG_KEY: options}
        asynchronous = config.scheduler_config.async_scheduling
        return resolve_obj_by_qualname(scheduler_path(async_scheduling=asynchronous))(
            vllm_config=config,
            kv_cache_config=stock.kv_cache_config,
            structured_output_manager=self.core.structured_output_manager,
            block_size=stock.block_size,
            hash_block_size=stock.hash_block_size,
            log_stats=False,
        )

    def _count(self, scheduler: Any) -> None:
        schedule, preempt = scheduler.schedule, scheduler._preempt_request

        def counted_schedule(*arguments: Any, **keywords: Any) -> Any:
            output = schedule(*arguments, **keywords)
            self.computed += output.total_num_scheduled_tokens
            self.steps += 1
            if output.num_scheduled_tokens:
                requests = len(output.num_scheduled_tokens)
                self.schedules.append((time.perf_counter(), output.total_num_scheduled_tokens, requests))
            return output

        def counted_preempt(*arguments: Any, **keywords: Any) -> None:
            self.preemptions += 1
            preempt(*arguments, **keywords)

        scheduler.schedule, scheduler._preempt_request = counted_schedule, counted_preempt


def main() -> None:
    talk = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM prints to standard output
    worker = Worker(**json.loads(sys.argv[1]))
    talk.write(json.dumps(worker.settings) + "\n")
    for line in sys.stdin:
        talk.write(json.dumps(worker.run(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
