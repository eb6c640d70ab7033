"""One vLLM engine in a process of its own, for `engine.py`: loads, then runs what comes on its standard input.

    python engine_worker.py '{"arguments": {...}, "scheduler": {...} or null}'

Prints one line `ready`, then for each line of input (a JSON `Order`) one JSON line with what the run gave. It imports
nothing that loads numba: vLLM 0.32 on CPUs does not start then.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from typing import Any

import numpy as np

from batchllm_kernels.vllm_plugin import scheduler_path
from batchllm_kernels.vllm_plugin.options import CONFIG_KEY, PlannedRequest


class Worker:
    """An engine whose steps are counted from inside its scheduler."""

    def __init__(self, arguments: dict[str, Any], scheduler: dict[str, Any] | None) -> None:
        # In this process, so that the scheduler can be looked at; on every device and for every mode alike.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        if scheduler is not None:
            arguments["additional_config"] = {CONFIG_KEY: scheduler}
        config = EngineArgs(**arguments, disable_log_stats=True).create_engine_config(UsageContext.LLM_CLASS)
        if scheduler is not None:
            asynchronous = config.scheduler_config.async_scheduling
            config.scheduler_config.scheduler_cls = scheduler_path(async_scheduling=asynchronous)
        self.engine = LLMEngine.from_vllm_config(config, UsageContext.LLM_CLASS, disable_log_stats=True)
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.settings = {
            name: getattr(config.scheduler_config, name)
            for name in ("max_num_seqs", "max_num_batched_tokens", "async_scheduling")
        } | {"block_size": config.cache_config.block_size, "blocks": config.cache_config.num_gpu_blocks}
        self.computed = self.steps = self.preemptions = 0
        self._count(self.scheduler)

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """Answer the prompts of a file in the order given; all fed at once, or a bounded queue.

        order: `prompts` (npz of `tokens`, `offsets`), `rows`, `output_tokens` by row, `plan` by row or null: group,
        prefix tokens, expected output tokens; `ahead`: requests fed ahead of the engine, or null; `logprobs`: whether
        to return those of the tokens that were chosen.
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
        self.engine.reset_prefix_cache()
        self.computed = self.steps = self.preemptions = 0
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
        wrong = [row for row in order["rows"] if len(answers[str(row)]) != order["output_tokens"][row]]
        if wrong:
            raise ValueError(f"rows {wrong[:5]}: expected another number of output tokens")
        outputs = sum(order["output_tokens"][row] - 1 for row in order["rows"])
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            # The first token of an output comes out of the prefill.
            "computed_prompt_tokens": self.computed - outputs,
            "steps": self.steps,
            "preemptions": self.preemptions,
            "answers": [answers[str(row)] for row in sorted(order["rows"])],
            "logprobs": [logprobs[str(row)] for row in sorted(order["rows"])] if order["logprobs"] else None,
        }

    def _count(self, scheduler: Any) -> None:
        schedule, preempt = scheduler.schedule, scheduler._preempt_request

        def counted_schedule(*arguments: Any, **keywords: Any) -> Any:
            output = schedule(*arguments, **keywords)
            self.computed += output.total_num_scheduled_tokens
            self.steps += 1
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
