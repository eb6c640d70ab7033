"""Which engines run on this machine: their share of its devices, and their logs."""

from __future__ import annotations

import os
from pathlib import Path

from batchllm_operators.execute.handle import LocalEngineHandle
from batchllm_operators.machine.devices import device_shares, gpus_of_machine
from batchllm_operators.specs.execution import ExecutionSpec


def local_handle(execution: ExecutionSpec, index: int, log_file: Path) -> LocalEngineHandle:
    """The handle of the engine with an index; its process is not started.

    Args:
        execution: how many engines there are, on what, and their deadlines.
        index: of this one, below `execution.engines`.
        log_file: where its output goes.

    Raises:
        TerminalError: this machine has not enough devices for all engines.
    """
    shares = device_shares(
        execution.engines, execution.gpus_per_engine, gpus_of_machine(), sorted(os.sched_getaffinity(0))
    )
    return LocalEngineHandle(
        f"engine {index}",
        devices=shares[index],
        log_file=log_file,
        python=execution.engine_python,
        load_timeout_s=execution.load_timeout_s,
        stall_timeout_s=execution.stall_timeout_s,
    )
