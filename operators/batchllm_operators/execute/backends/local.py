"""Engines as processes of this machine: each in a session of its own, spoken to over a socket."""

from __future__ import annotations

import os
import selectors
import socket
import sys
import threading
from collections.abc import Sequence

from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.backends.base import BackendKind, Death, Place
from batchllm_operators.execute.backends.engine_logs import EngineLogs
from batchllm_operators.execute.backends.engine_subprocess import EngineSubprocess
from batchllm_operators.execute.messages import Event, Load, Run, Shutdown, decode_event, encode
from batchllm_operators.machine.devices import device_shares, gpus_of_machine
from batchllm_operators.specs.execution import ExecutionSpec
from batchllm_operators.store import Store

SEND_SECONDS = 1.0
"""A stopped engine whose socket is full counts as deaf after so long; who waits for its events is told why."""


class LocalBackend:
    """The engines of a run on this machine. GPUs are shared out; without GPUs the CPU cores are.

    Args:
        places: where the engines live.
        python: interpreter of the engines' environment; it must have this package and vLLM. Default: this one.
    """

    def __init__(self, places: Sequence[Place], python: str | None = None) -> None:
        self._places = tuple(places)
        self._python = python or sys.executable
        self._logs = EngineLogs()

    def places(self) -> Sequence[Place]:
        """The places, one for each engine of the job."""
        return self._places

    def start(self, place: Place) -> LocalLink:
        """Start an engine process, which imports its packages until it is told to load a model.

        Raises:
            TerminalError: there is no such interpreter.
        """
        ours, theirs = socket.socketpair()
        arguments = [
            self._python, "-P", "-m", "batchllm_operators.execute.backends.local_worker",
            "--channel-fd", str(theirs.fileno()), "--parent-pid", str(os.getpid()),
            "--cores", ",".join(map(str, place.devices.cores)), "--folder", str(self._logs.folder),
        ]  # fmt: skip
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if place.devices.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(place.devices.gpus)
        try:
            process = EngineSubprocess(
                arguments, environment, pass_fd=theirs.fileno(), log_file=self._logs.file(place.index)
            )
        except OSError as error:
            ours.close()
            raise TerminalError(f"execution.engine_python: cannot start {self._python!r}: {error}") from error
        finally:
            theirs.close()
        return LocalLink(place, process, ours)

    def keep_logs(self, work: Store) -> list[str]:
        """Write the end of each log to `logs/` of the work folder."""
        return self._logs.keep(work)

    def close(self) -> None:
        """Remove the local logs."""
        self._logs.remove()


class LocalLink:
    """The link to an engine process; commands and events are JSON lines."""

    def __init__(self, place: Place, process: EngineSubprocess, channel: socket.socket) -> None:
        self.place = place
        self._process = process
        self._channel = channel
        self._channel.settimeout(SEND_SECONDS)
        self._sending = threading.Lock()
        self._received = b""
        self._death: Death | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ)

    @property
    def pid(self) -> int:
        """The process id of the engine, which is that of its group and its session too."""
        return self._process.pid

    @property
    def log(self) -> str:
        """The local file that the process writes to."""
        return str(self._process.log_file)

    def send(self, command: Load | Run | Shutdown) -> None:
        """Write a command to the socket."""
        with self._sending:
            self._channel.sendall(encode(command))

    def receive(self, timeout_s: float) -> Event | None:
        """Read the next line from the socket."""
        while b"\n" not in self._received:
            if not self._selector.select(timeout_s):
                return None
            data = self._channel.recv(65536)
            if not data:
                raise EOFError
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return decode_event(line)

    def death(self, wait_s: float = 0.0) -> Death | None:
        """How the process has ended, by its exit code; its group may go on until it is killed."""
        code = self._process.exit_code(wait_s)
        if code is not None and self._death is None:
            self._death = Death.by_exit_code(
                code,
                log_tail=self._process.last_lines(),
                root_cause=self._process.root_cause(),
                cause=self._process.cause_of_death(),
            )
        return self._death

    def silence(self) -> str:
        """The state of the process, as Linux tells it."""
        return self._process.state()

    def kill(self) -> None:
        """Kill the process and its group."""
        self._process.kill()

    def close(self) -> None:
        """Close the socket."""
        self._selector.close()
        with self._sending:
            self._channel.close()


def open_local(execution: ExecutionSpec) -> LocalBackend:
    """The backend of a job on this machine.

    Raises:
        TerminalError: this machine has not enough devices for all engines.
    """
    shares = device_shares(
        execution.engines, execution.gpus_per_engine, gpus_of_machine(), sorted(os.sched_getaffinity(0))
    )
    places = [Place(index=index, devices=share) for index, share in enumerate(shares)]
    return LocalBackend(places, execution.engine_python)


LOCAL = BackendKind("local", open_local)
