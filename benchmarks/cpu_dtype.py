"""What bfloat16 costs and gains on this CPU, over float32, with and without the instructions for it.

    python benchmarks/cpu_dtype.py --model .models/SmolLM2-135M-Instruct --json

Four engines one after the other: bfloat16 and float32, each as the processor is and limited to AVX2
(`ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2`). One thread, and seconds of that thread, so that other work on the
machine hardly counts. Refuses to report where an engine does not compute what it was asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

from batchllm_operators.execute.engine import Engine, Request
from batchllm_operators.execute.vllm_engine import VllmEngine
from batchllm_operators.machine.processor import cpu_name
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.sampling import SamplingParameters

LIMITS: dict[str, dict[str, str]] = {
    "as it is": {},
    "limited to AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
DTYPES = ("bfloat16", "float32")
PREFILL_TOKENS = 512
WIDTHS = (1, 8, 32)
OUTPUT_TOKENS = 17


def steps(engine: Engine, requests: int, prompt_tokens: int, output_tokens: int, chance: random.Random) -> list[float]:
    """Seconds of each step of requests that share nothing."""
    for _ in range(requests):
        prompt = chance.choices(range(engine.limits.vocabulary), k=prompt_tokens)
        if refused := engine.submit(Request(uuid4().bytes, prompt, SamplingParameters(max_tokens=output_tokens))):
            raise RuntimeError(f"refused: {refused.error}")
    seconds, answered = [], 0
    while engine.unfinished:
        began = time.process_time()
        for one in engine.step():
            answered += one.prompt_tokens == prompt_tokens and (one.completion_tokens or 0) >= 1
        seconds.append(time.process_time() - began)
    if answered != requests:
        raise RuntimeError(f"expected {requests} answers, got {answered}")
    return seconds


def measure(model: str, dtype: str) -> dict[str, Any]:
    """The figures of one engine, in this process."""
    import torch

    torch.set_num_threads(1)
    arguments = {"enforce_eager": True, "kv_cache_memory_bytes": 512 * 1024**2}
    spec = ModelSpec.model_validate({"id": model, "dtype": dtype, "max_model_len": 2048, "engine_args": arguments})
    engine = VllmEngine(spec, block_size=32, gpus=1)
    torch.set_num_threads(1)
    chance = random.Random(0)
    steps(engine, 1, 128, 4, chance)
    prefill = min(sum(steps(engine, 1, PREFILL_TOKENS, 1, chance)) for _ in range(3))
    decode = {
        str(width): round(1000 * statistics.median(steps(engine, width, 64, OUTPUT_TOKENS, chance)[-8:]), 1)
        for width in WIDTHS
    }
    engine.close()
    return {"prefill_tokens_per_second": round(PREFILL_TOKENS / prefill), "decode_step_ms": decode}


def rows(model: str) -> Iterator[dict[str, Any]]:
    """One row an engine, each in a process of its own: the limits are read when the libraries load."""
    for limit, variables in LIMITS.items():
        for dtype in DTYPES:
            command = [sys.executable, __file__, "--model", model, "--one", dtype]
            environment = {name: value for name, value in os.environ.items() if name not in LIMITS["limited to AVX2"]}
            done = subprocess.run(
                command, env=environment | ONE_THREAD | variables, stdout=subprocess.PIPE, text=True, check=True
            )
            yield {"processor": limit, "dtype": dtype} | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".models/SmolLM2-135M-Instruct")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=DTYPES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.model, given.one)))
        return
    found = list(rows(given.model))
    if given.json:
        print(json.dumps({"processor": cpu_name(), "load_average": os.getloadavg()[0], "rows": found}, indent=2))
        return
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
