"""Engines one after another in a process, short of KV blocks: prints what `compared_tables` found in their steps.

python -m tests.vllm_plugin.compared_engine MODEL (whole | spoilt)...
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any


def main() -> None:
    model, *states = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, "tests.vllm_plugin.compared_tables.ComparingBackend")
    found = []
    for state in states:
        if state == "spoilt":
            _lose_blocks_of_running_requests()
        found.append(_steps_of_an_engine(model))
    print(json.dumps(found))


def _steps_of_an_engine(model: str) -> dict[str, Any]:
    from vllm import EngineArgs, LLMEngine, SamplingParams

    from tests.vllm_plugin.compared_tables import ComparingBuilder

    ComparingBuilder.compared.clear()
    arguments = EngineArgs(
        model,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=8,
        max_num_seqs=4,
        max_num_batched_tokens=96,
        max_model_len=160,
        enable_prefix_caching=True,
        async_scheduling=True,
    )
    engine = LLMEngine.from_engine_args(arguments)
    seen: Counter[str] = Counter()
    _count_what_is_scheduled(engine, seen)
    shared = list(range(1000, 1070))
    # each of them needs another block at its third token
    prompts = [[*shared, *range(2000 + 50 * n, 2024 + 50 * n)] for n in range(4)] + [list(range(5000, 5030))] * 2
    waiting = list(enumerate(prompts))
    finished = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0][0] < 4 + finished:  # the later ones join while others run
            number, prompt = waiting.pop(0)
            parameters = SamplingParams(temperature=0.0, max_tokens=4 + number, ignore_eos=True)
            engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
        finished += sum(one.finished for one in engine.step())
    runner = type(engine.model_executor.driver_worker.worker.model_runner)
    engine.engine_core.shutdown()
    return {"steps": list(ComparingBuilder.compared), "runner": runner.__module__, **seen}


def _count_what_is_scheduled(engine: Any, seen: Counter[str]) -> None:
    scheduler = engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule

    def counting(*args: Any, **options: Any) -> Any:
        output = schedule(*args, **options)
        seen["scheduled"] += output.total_num_scheduled_tokens > 0
        seen["preempted"] += len(output.preempted_req_ids or ())
        seen["finished"] += len(output.finished_req_ids)
        seen["new"] += len(output.scheduled_new_reqs)
        seen["hits"] += sum(one.num_computed_tokens > 0 for one in output.scheduled_new_reqs)
        return output

    scheduler.schedule = counting


def _lose_blocks_of_running_requests() -> None:
    """What a mirror would be that is not told of the blocks a request gets while it runs."""
    from batchllm_kernels.vllm_plugin.block_table_mirror import BlockTableMirror

    write = BlockTableMirror.write

    def forgetful(mirror: BlockTableMirror, group: int, request: int, start: int, block_ids: Sequence[int]) -> None:
        if start == 0:
            write(mirror, group, request, start, block_ids)

    BlockTableMirror.write = forgetful  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
