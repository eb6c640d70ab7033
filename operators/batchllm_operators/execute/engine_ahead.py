"""An engine process that is started before there is a run for it, so that it imports vLLM while Prefect starts.

It loads no model before a pool of the same block takes it and has something to compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass

from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.engine_logs import EngineLogs
from batchllm_operators.execute.handle import LocalEngineHandle
from batchllm_operators.execute.local_engines import local_handle
from batchllm_operators.specs.execution import ExecutionSpec


@dataclass(slots=True)
class _Ahead:
    """The handle of the engine, until a pool takes it."""

    execution: ExecutionSpec
    handle: LocalEngineHandle | None


_AHEAD: ContextVar[_Ahead | None] = ContextVar("engine_ahead", default=None)


@contextmanager
def engine_ahead(execution: ExecutionSpec) -> Iterator[None]:
    """Start the process of the first engine; the first pool made within the block for this execution part takes it.

    It has ended when the block has. What prevents its start is told by the pool, which tries again.

    Args:
        execution: of the job that is going to run.
    """
    logs = EngineLogs()
    handle = None
    try:
        with suppress(TerminalError):
            handle = local_handle(execution, 0, logs.file(0))
            handle.start()
        token = _AHEAD.set(_Ahead(execution, handle))
        try:
            yield
        finally:
            _AHEAD.reset(token)
    finally:
        if handle is not None:
            handle.close()
        logs.remove()


def take_engine_ahead(execution: ExecutionSpec) -> LocalEngineHandle | None:
    """The started engine of the block around the caller, for whoever asks first; None where there is none.

    Args:
        execution: must be that of the block.
    """
    ahead = _AHEAD.get()
    if ahead is None or ahead.execution != execution:
        return None
    handle, ahead.handle = ahead.handle, None
    return handle
