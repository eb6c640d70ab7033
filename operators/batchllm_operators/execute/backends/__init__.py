"""Engine backends: where the engines of a run live. Processes of this machine are built in.

To add one, see the contract in `base`: make a `BackendKind` and register it, by `register_backend` in the processes you
start yourself, or by an entry point in the group `batchllm_flows.engine_backends`, which the command line and Prefect's
workers find too.
"""

from __future__ import annotations

from batchllm_operators.backend_names import BACKENDS
from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.backends.base import BackendKind, Death, EngineBackend, EngineLink, Place
from batchllm_operators.specs.execution import ExecutionSpec

__all__ = [
    "BackendKind",
    "Death",
    "EngineBackend",
    "EngineLink",
    "Place",
    "open_backend",
    "register_backend",
    "unregister_backend",
]


def register_backend(added: BackendKind) -> None:
    """Make a backend known to this process; the same one twice is no error.

    Raises:
        TypeError: not a `BackendKind`.
        ValueError: another backend has the name.
    """
    BACKENDS.register(added)


def unregister_backend(name: str) -> None:
    """Take back what `register_backend` added.

    Raises:
        KeyError: it added no backend of this name.
    """
    BACKENDS.remove(name)


def open_backend(execution: ExecutionSpec) -> EngineBackend:
    """The backend that a job names, opened for its engines; none is started.

    Raises:
        TerminalError: the package that brings it cannot be imported, or there is less than the job asks for.
    """
    try:
        kind: BackendKind = BACKENDS.get(execution.backend)
    except ValueError as error:
        raise TerminalError(f"execution.backend: {error}") from error
    return kind.open(execution)
