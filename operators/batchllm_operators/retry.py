"""Which failed task runs Prefect tries again."""

from __future__ import annotations

from typing import Any

from batchllm_operators.errors import TransientError

RETRIES = 3
RETRY_DELAYS_SECONDS = [1.0, 5.0, 20.0]


def retry_transient(task: Any, task_run: Any, state: Any) -> bool:
    """Retry condition of the tasks: another attempt is made after a `TransientError` only."""
    del task, task_run
    return isinstance(state.data, TransientError)
