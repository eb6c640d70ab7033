"""Engines one after another in one process: prints for each its attention and its greedy answers, or its error.

python -m tests.execute.attention_engines JOBS.json

A job is `{"model": {fields of ModelSpec}, "ranks": tensor-parallel size, "prompts": [[token, ...], ...], "max_tokens":
[tokens of each answer, ...], 8 if left out}`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from batchllm_kernels.vllm_plugin.options import ATTENTION_TRACE_VARIABLE
from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.engine import Request
from batchllm_operators.execute.vllm_engine import VllmEngine
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.sampling import SamplingParameters

TELLING = ("vllm.v1.worker.cpu.model_runner", "batchllm_kernels.attention.launch")
"""Modules that are imported when vLLM's second model runner is made, and when a kernel of ours runs."""


def answers(job: dict[str, Any]) -> dict[str, Any]:
    if job["ranks"] > 1:
        # By itself vLLM wants a NUMA node for each rank on a CPU.
        cores = sorted(os.sched_getaffinity(0)) * job["ranks"]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores[: job["ranks"]]))
    try:
        engine = VllmEngine(ModelSpec.model_validate(job["model"]), block_size=32, gpus=job["ranks"])
    except TerminalError as error:
        return {"error": str(error)}
    for number, prompt in enumerate(job["prompts"]):
        sampling = SamplingParameters(max_tokens=job["max_tokens"][number] if "max_tokens" in job else 8)
        assert engine.submit(Request(number.to_bytes(16, "big"), prompt, sampling)) is None
    tokens = {}
    while engine.unfinished:
        for done in engine.step():
            tokens[done.request_key.hex()] = done.values[0]
    attention = next(one for one in engine.settings if one.name == "attention")
    engine.close()
    return {
        "value": attention.value,
        "reason": attention.reason,
        "tokens": [tokens[key] for key in sorted(tokens)],
        "modules": [name for name in TELLING if name in sys.modules],
    }


def main() -> None:
    found = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        told = answers(job)
        trace = Path(os.environ[ATTENTION_TRACE_VARIABLE])
        told["traced"] = len(trace.read_text().splitlines()) if trace.exists() else 0
        found.append({**told, "left": [name for name in os.environ if name.startswith("BATCHLLM_ATTENTION")]})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
