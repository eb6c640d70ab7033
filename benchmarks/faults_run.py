"""One run of the job of `faults.py` on a scripted engine, in a process that may be killed.

As a command: python -m benchmarks.faults_run JOB LOG STEP_SECONDS.
"""

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


def run_once(job: Path, answered: Path, step_seconds: float, output: Path | None = None) -> None:
    """Run a job; what it prints goes to a file, where one is given."""
    if output is not None:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    register_scripted(answered, step_seconds)
    batch_inference(BatchJob.model_validate_json(job.read_text()))


if __name__ == "__main__":
    run_once(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
