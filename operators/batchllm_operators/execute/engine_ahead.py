"""An engine that is started before there is a run for it, so that it imports vLLM while Prefect starts.

It loads no model before a run inside the same block takes it and has something to compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass

from batchllm_operators.errors import BatchLLMError
from batchllm_operators.execute.backends import open_backend
from batchllm_operators.execute.backends.base import EngineBackend, EngineLink
from batchllm_operators.specs.execution import ExecutionSpec


@dataclass(frozen=True, slots=True)
class EngineAhead:
    """An opened backend, and the link to the engine of its first place."""

    execution: ExecutionSpec
    backend: EngineBackend
    link: EngineLink

    def end(self) -> None:
        """End the engine and the backend."""
        self.link.kill()
        self.link.close()
        self.backend.close()


_AHEAD: ContextVar[list[EngineAhead]] = ContextVar("engine_ahead")


@contextmanager
def engine_ahead(execution: ExecutionSpec) -> Iterator[None]:
    """Start the first engine; the first run within the block with this execution part takes it.

    An engine that nobody has taken ends with the block. What prevents its start is told by the run, which tries again.

    Args:
        execution: of the job that is going to run.
    """
    waiting: list[EngineAhead] = []
    with suppress(BatchLLMError):
        backend = open_backend(execution)
        try:
            waiting.append(EngineAhead(execution, backend, backend.start(backend.places()[0])))
        except BatchLLMError:
            backend.close()
            raise
    token = _AHEAD.set(waiting)
    try:
        yield
    finally:
        _AHEAD.reset(token)
        for ahead in waiting:
            ahead.end()


def take_engine_ahead(execution: ExecutionSpec) -> EngineAhead | None:
    """The started engine of the block around the caller, for whoever asks first; None where there is none.

    Args:
        execution: must be that of the block.
    """
    waiting = _AHEAD.get([])
    return waiting.pop() if waiting and waiting[-1].execution == execution else None
