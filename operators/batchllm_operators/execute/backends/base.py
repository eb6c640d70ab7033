"""The contract of engine backends: where engines run, and how the driver of each engine speaks to it.

A backend knows one kind of place: processes of this machine, threads, actors of a cluster. It starts engines there and
hands out a link to each. Everything above a link is the same for all backends: `EngineDriver` sends commands and routes
events, `EngineFleet` lends engines to bundles. Everything below is `EngineLoop`, which a backend runs where the engine
is. `tests/execute/test_backends.py` is what every backend must keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from batchllm_operators.execute.messages import Event, Load, Run, Shutdown
from batchllm_operators.machine.devices import DeviceShare
from batchllm_operators.records import Record
from batchllm_operators.specs.execution import ExecutionSpec
from batchllm_operators.store import Store


class Place(Record):
    """Where one engine of a run lives. The place outlives its engine: a dead one is started again there."""

    index: int
    """The number of the engine in its run, from 0 on."""
    devices: DeviceShare = DeviceShare()
    """The GPUs or cores of the engine, where the backend assigns them."""

    @property
    def name(self) -> str:
        """The name of the engine in messages and logs."""
        return f"engine {self.index}"


@dataclass(frozen=True, slots=True)
class Death:
    """How an engine has ended."""

    how: str
    """The cause in a few words, such as `killed by signal 9`."""
    exit_code: int | None
    """The exit code of its process, or minus the signal that killed it; None: not known."""
    log_tail: str = ""
    """The last lines of its log, ready to stand behind an error message; empty where there are none."""
    root_cause: str = ""
    """The error in its log that the others follow from; empty where none is found."""
    cause: str = ""
    """What the machine did to it, and what can be done about that; empty where nothing tells."""

    @classmethod
    def by_exit_code(cls, code: int, *, log_tail: str = "", root_cause: str = "", cause: str = "") -> Death:
        """The death of a process with this exit code, or minus the signal that killed it."""
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return cls(how, code, log_tail, root_cause, cause)


class EngineLink(Protocol):
    """The connection to one started engine. `receive` is called by one thread; the rest may be called by any thread.

    An engine sends `Started` first, and its events arrive in the order in which they were sent, each once.
    """

    @property
    def place(self) -> Place:
        """Where the engine lives."""

    @property
    def log(self) -> str:
        """Where the output of the engine can be read, for people; empty: nowhere."""

    def send(self, command: Load | Run | Shutdown) -> None:
        """Give the engine a command, without waiting for it to listen.

        Raises:
            OSError: nobody listens. Whoever waits for events is told why, so the driver passes over it.
        """

    def receive(self, timeout_s: float) -> Event | None:
        """The next event, or None where none came within so many seconds.

        Raises:
            EOFError, OSError: there will be no more events.
            ValueError: what came is no event.
        """

    def death(self, wait_s: float = 0.0) -> Death | None:
        """How the engine ended, within so many seconds; None: it has not ended. Stays the same from then on."""

    def silence(self) -> str:
        """Why a living engine may not be heard, as far as can be seen from here; empty: nothing is known."""

    def kill(self) -> None:
        """End the engine at once, with all that it has started; returns when it has ended. More than once is harmless.

        Events that it has sent before can still be received.
        """

    def close(self) -> None:
        """Free what the link holds; called once, after `kill`, when nobody is in `receive`."""


class EngineBackend(Protocol):
    """The places of a run's engines; all methods may be called from any thread."""

    def places(self) -> Sequence[Place]:
        """The places, numbered from 0 on; always the same."""

    def start(self, place: Place) -> EngineLink:
        """Start an engine without a model, where none lives now; returns before it is ready.

        Raises:
            TerminalError: it can never be started there, with the field of the job that says so.
            TransientError: it cannot be started for now.
        """

    def keep_logs(self, work: Store) -> list[str]:
        """Write the end of each engine's log to the work folder; returns the places. Never raises for the store."""

    def close(self) -> None:
        """Free what the backend holds, after all links are closed; more than once is harmless."""


@dataclass(frozen=True)
class BackendKind:
    """A registered backend: its name in `execution.backend`, and what opens it for a run.

    `open` gets the execution part of the job. It raises `TerminalError` where the job asks for more than there is.
    """

    name: str
    open: Callable[[ExecutionSpec], EngineBackend]
