"""Engine handles: how a task thread drives an engine that lives in a process of its own."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from batchllm_operators.errors import BatchLLMError, TerminalError, TransientError
from batchllm_operators.execute.devices import DeviceShare
from batchllm_operators.execute.messages import (
    BundleCounts,
    BundleDone,
    Failed,
    Load,
    Loaded,
    PartWritten,
    Progress,
    Run,
    Shutdown,
    Started,
    decode_event,
    encode,
)
from batchllm_operators.records import Record

START_TIMEOUT_SECONDS = 120.0
CLOSE_GRACE_SECONDS = 10.0
GROUP_END_SECONDS = 10.0
LOG_LINES = 12
_POLL_SECONDS = 0.2

ProgressCallback = Callable[[str, BundleCounts], None]
"""Takes a bundle's name and its counts so far."""

_Event = TypeVar("_Event", bound=Record)


class EngineHandle(Protocol):
    """One engine, driven by one thread at a time; `close` may be called from any thread."""

    @property
    def usable(self) -> bool:
        """Whether it takes commands: neither dead nor closed."""

    def load(self, command: Load) -> float:
        """Start the engine and load its model; returns the seconds that took."""

    def run_bundle(self, command: Run, on_progress: ProgressCallback, on_part: Callable[[str], None]) -> BundleDone:
        """Compute one bundle, reporting counts and parts as they come."""

    def close(self) -> None:
        """End the engine, finished rows kept; a call that is waiting for it raises at once."""


class LocalEngineHandle:
    """An engine process on this machine, in a session of its own, spoken to over a socket.

    Args:
        name: in error messages.
        devices: GPUs or cores of this engine.
        log_file: where the output of the process goes; appended to.
        python: interpreter of the engine's environment; it must have this package and vLLM.
        load_timeout_s: seconds that loading the model may take.
        stall_timeout_s: seconds without a sign of life after which the engine counts as lost.
        close_grace_s: seconds the engine may take to write what is finished when it is closed.

    Errors of `load` and `run_bundle`: `TransientError` when the engine died, stalled, or the store failed for now,
    with the exit code and the last lines of its log; `TerminalError` when the model cannot be loaded, with the reason,
    and when the handle is closed meanwhile.
    """

    def __init__(
        self,
        name: str,
        *,
        devices: DeviceShare,
        log_file: Path,
        load_timeout_s: float,
        stall_timeout_s: float,
        python: str | None = None,
        close_grace_s: float = CLOSE_GRACE_SECONDS,
    ) -> None:
        self._name = name
        self._devices = devices
        self._log_file = log_file
        self._python = python or sys.executable
        self._load_timeout_s = load_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._close_grace_s = close_grace_s
        self._process: subprocess.Popen[bytes] | None = None
        self._loading = False
        self._broken = False
        self._received = b""
        self._channel, self._engine_end = socket.socketpair()
        self._wake, self._wake_end = socket.socketpair()
        self._closing = threading.Event()
        self._conversation = threading.Lock()
        self._process_lock = threading.Lock()
        self._close_lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the engine, which is its group's and its session's too; None before it is started."""
        return self._process.pid if self._process else None

    @property
    def usable(self) -> bool:
        """Whether it takes commands: neither dead nor closed."""
        return not (self._broken or self._closing.is_set() or (self._process is not None and self._exited()))

    def load(self, command: Load) -> float:
        """Start the process and load the model; returns the seconds both took."""
        started = time.monotonic()
        with self._conversation:
            self._loading = True
            try:
                self._start()
                self._expect(Started, START_TIMEOUT_SECONDS, "starting")
                self._send(command, "loading the model")
                self._expect(Loaded, self._load_timeout_s, "loading the model")
            except _EngineLostError as error:
                self._break()
                # A process that ends by itself lacks something; one that was killed may do better the next time.
                kind = TransientError if error.exit_code is None or error.exit_code < 0 else TerminalError
                raise kind(error.message) from None
            except BaseException:
                self._break()
                raise
            finally:
                self._loading = False
        return time.monotonic() - started

    def run_bundle(self, command: Run, on_progress: ProgressCallback, on_part: Callable[[str], None]) -> BundleDone:
        """Compute one bundle; the callbacks run in the calling thread."""
        settled = False
        with self._conversation:
            try:
                self._send(command, "running")
                while True:
                    event = self._next_event(self._stall_timeout_s, "running")
                    if isinstance(event, Progress):
                        on_progress(event.bundle, event.counts)
                    elif isinstance(event, PartWritten):
                        on_part(event.name)
                    elif isinstance(event, BundleDone):
                        settled = True
                        return event
                    elif isinstance(event, Failed):
                        settled = not event.engine_lost
                        raise self._failure(event)
            except _EngineLostError as error:
                raise TransientError(error.message, bundle=command.bundle) from None
            except BatchLLMError as error:
                error.bundle = command.bundle
                raise
            finally:
                # An engine left in the midst of a bundle would answer the next command with the rest of this one.
                # One that is being closed is still to write its finished rows.
                if not settled and not self._closing.is_set():
                    self._break()

    def close(self) -> None:
        """End the process and everything in its group; safe from any thread and more than once."""
        with self._close_lock:
            if self._closing.is_set():
                return
            self._closing.set()
            self._wake_end.send(b"x")
            with self._process_lock:
                started = self._process is not None
            if started and not self._broken and not self._loading and not self._exited():
                self._ask_to_shut_down()
            self._kill()
            with self._conversation:
                for end in (self._channel, self._engine_end, self._wake, self._wake_end):
                    end.close()

    def _start(self) -> None:
        arguments = [
            self._python, "-P", "-m", "batchllm_operators.execute.engine_process",
            "--channel-fd", str(self._engine_end.fileno()), "--parent-pid", str(os.getpid()),
            "--cores", ",".join(map(str, self._devices.cores)),
        ]  # fmt: skip
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if self._devices.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._devices.gpus)
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._process_lock, self._log_file.open("ab") as log:
            if self._closing.is_set():
                raise self._closed()
            try:
                self._process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=[self._engine_end.fileno()],
                    start_new_session=True,
                )
            except OSError as error:
                raise TerminalError(f"execution.engine_python: cannot start {self._python!r}: {error}") from error
        self._engine_end.close()

    def _expect(self, kind: type[_Event], timeout_s: float, doing: str) -> _Event:
        event = self._next_event(timeout_s, doing)
        if isinstance(event, Failed):
            raise self._failure(event)
        if not isinstance(event, kind):
            raise TerminalError(f"{self._name}: expected {kind.__name__} while {doing}, got {type(event).__name__}")
        return event

    def _send(self, command: Record, doing: str) -> None:
        if self._closing.is_set():
            raise self._closed()
        try:
            self._channel.sendall(encode(command))
        except OSError:
            raise self._lost(doing) from None

    def _next_event(
        self, timeout_s: float, doing: str
    ) -> Started | Loaded | Progress | PartWritten | BundleDone | Failed:
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while b"\n" not in self._received:
                ready = [key.fileobj for key, _ in selector.select(_POLL_SECONDS)]
                if self._closing.is_set():
                    raise self._closed()
                if self._channel in ready:
                    data = self._channel.recv(65536)
                    if not data:
                        raise self._lost(doing)
                    self._received += data
                # Not only the end of the stream counts: a forked child of a dead engine can keep the socket open.
                elif self._exited():
                    raise self._lost(doing)
                elif time.monotonic() > deadline:
                    raise _EngineLostError(
                        f"{self._name} gave no sign of life for {timeout_s:g} s while {doing}{self._last_lines()}", None
                    )
        line, _, self._received = self._received.partition(b"\n")
        return decode_event(line)

    def _failure(self, event: Failed) -> BatchLLMError:
        kind = TransientError if event.transient else TerminalError
        reason = self._root_cause() if event.engine_lost and not event.transient else ""
        seen = " ".join(event.message.split())
        return kind(event.message if not reason or reason in seen else f"{seen}; {reason}", uri=event.uri)

    def _lost(self, doing: str) -> _EngineLostError:
        code = self._exit_code(_POLL_SECONDS * 10)
        how = "closed its channel" if code is None else f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return _EngineLostError(f"{self._name} died while {doing}: {how}{self._last_lines()}", code)

    def _closed(self) -> TerminalError:
        return TerminalError(f"{self._name} was closed")

    def _break(self) -> None:
        self._broken = True
        self._kill()

    def _ask_to_shut_down(self) -> None:
        try:
            # Without blocking: a stopped engine does not read, and the kill that follows is certain.
            self._channel.send(encode(Shutdown()), socket.MSG_DONTWAIT)
        except OSError:
            return
        self._exit_code(self._close_grace_s)

    def _kill(self) -> None:
        """Kill the whole group, also when its leader is dead: vLLM's engine core outlives it and holds the GPU."""
        with self._process_lock:
            process = self._process
            if process is None or process.returncode is not None:
                return
            # The leader has not been waited for, so its id, the group's, cannot have gone to anyone else.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _wait_until_gone(process.pid)

    def _exited(self) -> bool:
        return self._exit_code(0.0) is not None

    def _exit_code(self, wait_s: float) -> int | None:
        """Exit code, or minus the signal, of the process, within so many seconds; it is left to be waited for."""
        deadline = time.monotonic() + wait_s
        while True:
            with self._process_lock:
                if self._process is None:
                    return None
                if self._process.returncode is not None:
                    return self._process.returncode
                status = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if status is not None:
                return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.01)

    def _log_tail(self) -> list[str]:
        if not self._log_file.exists():
            return []
        with self._log_file.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 65536))
            return [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]

    def _last_lines(self) -> str:
        lines = self._log_tail()[-LOG_LINES:]
        return "".join(f"\n    {line}" for line in ["; last lines of its log:", *lines])[5:] if lines else ""

    def _root_cause(self) -> str:
        """The last error the engine core's own process logged; vLLM's exception says only that it failed."""
        causes = [line for line in self._log_tail() if line.startswith("(EngineCore") and "Error: " in line]
        return " ".join(causes[-1].split()) if causes else ""


def _wait_until_gone(group: int) -> None:
    """Wait until a killed group has no process left: a dying engine core still holds its GPU memory for a moment.

    Not for ever: where nobody reaps orphans, the group stays.
    """
    deadline = time.monotonic() + GROUP_END_SECONDS
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)


class _EngineLostError(Exception):
    """The process is dead or silent."""

    def __init__(self, message: str, exit_code: int | None) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
