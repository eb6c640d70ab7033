"""One run of the job of `faults.py`, in a process that may be killed: python -m benchmarks.faults_run JOB LOG STEP."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from batchllm_flows import BatchJob, batch_inference
from batchllm_operators.execute.backends import register_backend
from batchllm_operators.execute.backends.base import BackendKind
from batchllm_operators.execute.backends.inline import InlineBackend, Script, ScriptedMaker
from batchllm_operators.execute.engine import Request
from batchllm_operators.specs.execution import ExecutionSpec


def register_scripted(log: Path, step_seconds: float = 0.0) -> None:
    """Let jobs name the backend `scripted`: answers follow from prompts, and each answer leaves its key in the log."""

    def answer(request: Request) -> str:
        with log.open("a") as file:
            file.write(f"{request.key.hex()}\n")
        return str(request.prompt_token_ids[-9:])

    script = Script(step_seconds=step_seconds, answer=answer)

    def start(execution: ExecutionSpec) -> InlineBackend:
        return InlineBackend(execution.engines, lambda _place: ScriptedMaker(script))

    register_backend(BackendKind("scripted", start))


if __name__ == "__main__":
    register_scripted(Path(sys.argv[2]), float(sys.argv[3]))
    job = BatchJob.model_validate_json(Path(sys.argv[1]).read_text())
    print(os.getpid(), flush=True)
    batch_inference(job)
