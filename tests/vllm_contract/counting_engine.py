"""vLLM in a process of its own, measured as a calibration does, beside what its scheduler has scheduled.

    python counting_engine.py MODEL

It is its own process because vLLM 0.32 on CPUs does not start in one that has loaded numba.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm.v1.core.sched.scheduler import Scheduler

from batchllm_operators.execute.calibration import measure
from batchllm_operators.execute.engine import Request
from batchllm_operators.execute.vllm_engine import VllmEngine
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.sampling import SamplingParameters

SCHEDULED: Counter[str] = Counter()


class CountingScheduler(Scheduler):  # type: ignore[misc]  # vLLM is not type-checked
    """vLLM's own, which counts."""

    def schedule(self, *arguments: Any) -> Any:
        output = super().schedule(*arguments)
        SCHEDULED["steps"] += output.total_num_scheduled_tokens > 0
        for identity, tokens in output.num_scheduled_tokens.items():
            request = self.requests[identity]
            computed_before = request.num_computed_tokens - tokens
            SCHEDULED["prefill" if computed_before < request.num_prompt_tokens else "decode"] += tokens
        return output


def main() -> None:
    arguments = {
        "enforce_eager": True,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": 64 * 1024**2,
        "scheduler_cls": "__main__.CountingScheduler",
    }
    model = ModelSpec(id=sys.argv[1], dtype="float32", max_model_len=512, engine_args=arguments, allow_code=True)
    engine = VllmEngine(model, block_size=32, gpus=1)
    runs = []
    measured = measure(engine, seconds=600)
    next(measured)
    SCHEDULED.clear()
    for run in measured:
        taken = {"prefill": run.prefill_tokens, "decode": run.decode_tokens, "steps": run.steps}
        # Of two prefills, alike but for their tokens, the faster one counts.
        repeats = 1 if run.decode_tokens else 2
        runs.append({"taken": taken, "scheduled": {name: SCHEDULED[name] / repeats for name in taken}})
        SCHEDULED.clear()
    engine.submit(Request(bytes(16), [5] * 40, SamplingParameters(max_tokens=9)))
    computed = []
    while engine.unfinished:
        engine.step()
        computed.append(engine.computed_tokens)
    print(json.dumps({"runs": runs, "limits": asdict(engine.limits), "computed": computed}))
    engine.close()


if __name__ == "__main__":
    main()
