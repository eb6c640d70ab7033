"""Which engines run on this machine: their share of its devices, and their logs."""

from __future__ import annotations

import os
from collections.abc import Callable

from batchllm_operators.execute.devices import device_shares, gpus_of_machine
from batchllm_operators.execute.engine_logs import EngineLogs
from batchllm_operators.execute.handle import EngineHandle, LocalEngineHandle, StatusCallback
from batchllm_operators.execute.spec import ExecutionSpec


def local_handles(
    execution: ExecutionSpec, logs: EngineLogs, on_status: StatusCallback
) -> Callable[[int], EngineHandle]:
    """What makes the handle of the engine with an index.

    Args:
        execution: how many engines there are, on what, and their deadlines.
        logs: their log files.
        on_status: told what each does until its first tokens.

    Raises:
        TerminalError: this machine has not enough devices.
    """
    shares = device_shares(
        execution.engines, execution.gpus_per_engine, gpus_of_machine(), sorted(os.sched_getaffinity(0))
    )

    def make(index: int) -> LocalEngineHandle:
        return LocalEngineHandle(
            f"engine {index}",
            devices=shares[index],
            log_file=logs.file(index),
            python=execution.engine_python,
            load_timeout_s=execution.load_timeout_s,
            stall_timeout_s=execution.stall_timeout_s,
            on_status=on_status,
        )

    return make
