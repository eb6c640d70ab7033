"""Engine handles: how task threads drive an engine that lives in a process of its own."""

from __future__ import annotations

import math
import os
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar
from uuid import uuid4

from pydantic import ValidationError

from batchllm_kernels.vllm_plugin.load_phases import LOAD_PHASE_VARIABLE
from batchllm_kernels.vllm_plugin.options import ATTENTION_TRACE_VARIABLE, STEP_TRACE_VARIABLE
from batchllm_operators.errors import BatchLLMError, TerminalError, TransientError
from batchllm_operators.execute.engine_subprocess import EngineSubprocess
from batchllm_operators.execute.isolation import EngineDiedError
from batchllm_operators.execute.messages import (
    AllRead,
    BundleCounts,
    BundleDone,
    BundleEvent,
    EnginePhase,
    Event,
    Failed,
    Load,
    Loaded,
    Loading,
    PartWritten,
    Progress,
    Run,
    Shutdown,
    Started,
    decode_event,
    encode,
)
from batchllm_operators.machine.devices import DeviceShare
from batchllm_operators.records import Record

START_TIMEOUT_SECONDS = 120.0
CLOSE_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.2

ProgressCallback = Callable[[str, BundleCounts], None]
"""Takes a bundle's name and its counts so far."""

StatusCallback = Callable[[str, Loading | None], None]
"""Takes an engine's name and what it does before its first tokens; None: it computes them, or has ended."""

_Event = TypeVar("_Event", bound=Record)


def no_status(_engine: str, _loading: Loading | None) -> None:
    """Where nobody watches the engines."""


@dataclass(frozen=True, slots=True)
class BundleCallbacks:
    """What is told while a bundle runs, in the thread that waits for it."""

    on_progress: ProgressCallback
    on_part: Callable[[str], None]
    """Takes the name of a result part that is visible."""
    on_all_read: Callable[[], None]
    """The engine holds all that is left of the bundle and has room for the next one's requests."""


class EngineHandle(Protocol):
    """One engine; all methods may be called from any thread, `load` once and before the rest."""

    @property
    def usable(self) -> bool:
        """Whether it takes commands: neither dead nor closed."""

    def start(self) -> None:
        """Start the engine without a model, so that `load` has less to do."""

    def load(self, command: Load) -> Loaded:
        """Load the model, on an engine that is started if need be."""

    def run_bundle(self, command: Run, callbacks: BundleCallbacks) -> BundleDone:
        """Compute one bundle; several at a time are fed in the order of the calls."""

    def close(self) -> None:
        """End the engine, finished rows kept; calls that are waiting for it raise at once."""


class LocalEngineHandle:
    """An engine process on this machine, in a session of its own, spoken to over a socket.

    Args:
        name: in error messages.
        devices: GPUs or cores of this engine.
        log_file: where the output of the process goes; appended to.
        python: interpreter of the engine's environment; it must have this package and vLLM.
        load_timeout_s: seconds that loading the model may take.
        stall_timeout_s: seconds without a token computed, with bundles to compute, after which the engine counts as
            lost.
        close_grace_s: seconds the engine may take to write what is finished when it is closed.
        on_status: see the attribute of this name.

    Errors of `load` and `run_bundle`: `TransientError` when the engine or the store failed for now, and of these
    `EngineDiedError` when it died or stalled over its bundles, with the exit code and the last lines of its log;
    `TerminalError` when the model cannot be loaded, with the reason, and when the handle is closed meanwhile. An engine
    that dies fails all bundles it has.
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
        on_status: StatusCallback = no_status,
    ) -> None:
        self._name = name
        self._devices = devices
        self._process = EngineSubprocess(log_file)
        # An engine that takes the place of a dead one starts a trace of its own.
        self._trace_file = log_file.with_name(f"{log_file.stem}-{uuid4().hex}.steps")
        self._python = python or sys.executable
        self._load_timeout_s = load_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._close_grace_s = close_grace_s
        self.on_status = on_status
        """Told what the engine does until its first tokens."""
        self._loaded = False
        self._loading = False
        self._has_computed = False
        self._broken = False
        self._received = b""
        self._channel, self._engine_end = socket.socketpair()
        self._wake, self._wake_end = socket.socketpair()
        self._closing = threading.Event()
        self._close_lock = threading.Lock()
        self._load_lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._receiver = threading.Thread(target=self._receive, name=f"{name} events", daemon=True)
        # Guards the three below: which bundles wait for events, why there will be none, and the last sign of life.
        self._bundles_lock = threading.Lock()
        self._bundles: dict[str, queue.SimpleQueue[BundleEvent | _End]] = {}
        self._end: _End | None = None
        self._alive_at = 0.0

    @property
    def pid(self) -> int | None:
        """Process id of the engine, which is its group's and its session's too; None before it is started."""
        return self._process.pid

    @property
    def log_file(self) -> Path:
        """Where the output of the process goes."""
        return self._process.log_file

    @property
    def usable(self) -> bool:
        """Whether it takes commands: neither dead nor closed."""
        return not (self._broken or self._end or self._closing.is_set() or self._process.exited)

    def start(self) -> None:
        """Start the process, unless it is started: it imports its packages until there is something to load.

        Raises:
            TerminalError: there is no such interpreter, or the handle is closed.
        """
        if self._process.pid is None:
            self._start()

    def load(self, command: Load) -> Loaded:
        """Start the process, unless it is started, and load the model."""
        with self._load_lock:
            self._loading = True
            try:
                log = f"log: {self._process.log_file}"
                self.on_status(self._name, Loading(phase=EnginePhase.ENVIRONMENT, detail=log))
                self.start()
                self._expect(Started, START_TIMEOUT_SECONDS, "starting")
                self._send(command)
                loaded = self._expect(Loaded, self._load_timeout_s, "loading the model")
                self._loaded = True
                self._receiver.start()
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
                self.on_status(self._name, None)
        return loaded

    def run_bundle(self, command: Run, callbacks: BundleCallbacks) -> BundleDone:
        """Compute one bundle; the callbacks run in the calling thread."""
        settled = False
        events = self._await_events_of(command.bundle)
        try:
            self._send(command)
            if not self._has_computed:
                self.on_status(self._name, Loading(phase=EnginePhase.FIRST_TOKENS))
            while True:
                event = events.get()
                begins = isinstance(event, Progress) and not event.computed
                if not self._has_computed and not begins:
                    self._has_computed = True
                    self.on_status(self._name, None)
                if isinstance(event, Progress):
                    callbacks.on_progress(event.bundle, event.counts)
                elif isinstance(event, PartWritten):
                    callbacks.on_part(event.name)
                elif isinstance(event, AllRead):
                    callbacks.on_all_read()
                elif isinstance(event, BundleDone):
                    settled = True
                    return event
                elif isinstance(event, Failed):
                    settled = not event.engine_lost
                    if event.engine_lost:
                        # It ends by itself, after it has told its other bundles why: killed now, it could not.
                        self._broken = True
                        self._process.exit_code(self._close_grace_s)
                    raise self._failure(event)
                else:
                    raise event.error(command.bundle)
        finally:
            with self._bundles_lock:
                del self._bundles[command.bundle]
            # An engine left in the midst of a bundle would go on with it. One that is being closed is still to write
            # its finished rows.
            if not settled and not self._closing.is_set():
                self._break()

    def close(self) -> None:
        """End the process and everything in its group; safe from any thread and more than once."""
        with self._close_lock:
            if self._closing.is_set():
                return
            self._closing.set()
            self._wake_end.send(b"x")
            if self._loaded and not self._broken and not self._process.exited:
                self._ask_to_shut_down()
            self._process.kill()
            with self._load_lock:
                if self._receiver.ident is not None:
                    self._receiver.join()
                with self._send_lock:
                    for end in (self._channel, self._engine_end, self._wake, self._wake_end):
                        end.close()

    def _start(self) -> None:
        arguments = [
            self._python, "-P", "-m", "batchllm_operators.execute.engine_process",
            "--channel-fd", str(self._engine_end.fileno()), "--parent-pid", str(os.getpid()),
            "--cores", ",".join(map(str, self._devices.cores)),
        ]  # fmt: skip
        environment = os.environ | {
            "PYTHONUNBUFFERED": "1",
            STEP_TRACE_VARIABLE: str(self._trace_file),
            ATTENTION_TRACE_VARIABLE: str(self._trace_file.with_suffix(".attention")),
            LOAD_PHASE_VARIABLE: str(self._trace_file.with_suffix(".phases")),
        }
        if self._devices.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._devices.gpus)
        try:
            if not self._process.start(arguments, environment, self._engine_end.fileno()):
                raise self._closed()
        except OSError as error:
            raise TerminalError(f"execution.engine_python: cannot start {self._python!r}: {error}") from error
        self._engine_end.close()

    def _expect(self, kind: type[_Event], timeout_s: float, doing: str) -> _Event:
        deadline = time.monotonic() + timeout_s
        while isinstance(event := self._next_event(lambda: deadline, timeout_s, doing), Loading):
            self.on_status(self._name, event)
        if isinstance(event, Failed):
            raise self._failure(event)
        if not isinstance(event, kind):
            raise TerminalError(f"{self._name}: expected {kind.__name__} while {doing}, got {type(event).__name__}")
        return event

    def _send(self, command: Record) -> None:
        with self._send_lock:
            if self._closing.is_set():
                raise self._closed()
            # An engine that does not listen is dead, and who waits for its events is told so with the exit code.
            with suppress(OSError):
                self._channel.sendall(encode(command))

    def _await_events_of(self, bundle: str) -> queue.SimpleQueue[BundleEvent | _End]:
        events: queue.SimpleQueue[BundleEvent | _End] = queue.SimpleQueue()
        with self._bundles_lock:
            if self._end is not None:
                # It had ended before it was given this bundle, which is thus not to blame.
                kind = TransientError if self._end.kind is EngineDiedError else self._end.kind
                raise kind(self._end.message, bundle=bundle)
            if bundle in self._bundles:
                raise ValueError(f"{self._name}: expected another bundle, got {bundle} twice at a time")
            if not self._bundles:
                self._alive_at = time.monotonic()
            self._bundles[bundle] = events
        return events

    def _receive(self) -> None:
        """Hand events to the threads that wait for them, until there are no more; runs in a thread of its own."""
        try:
            while True:
                event = self._next_event(self._stall_deadline, self._stall_timeout_s, "running")
                with self._bundles_lock:
                    self._alive_at = time.monotonic()
                    if isinstance(event, BundleEvent) and event.bundle in self._bundles:
                        self._bundles[event.bundle].put(event)
        except _EngineLostError as error:
            end = _End(EngineDiedError, error.message)
        except TerminalError as error:
            end = _End(TerminalError, error.message)
        except ValidationError as error:
            end = _End(TerminalError, f"{self._name} said what is no event: {error}")
        with self._bundles_lock:
            self._end = end
            for events in self._bundles.values():
                events.put(end)

    def _stall_deadline(self) -> float:
        with self._bundles_lock:
            return self._alive_at + self._stall_timeout_s if self._bundles else math.inf

    def _next_event(self, deadline: Callable[[], float], timeout_s: float, doing: str) -> Event:
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
                elif self._process.exited:
                    raise self._lost(doing)
                elif time.monotonic() > deadline():
                    raise _EngineLostError(
                        f"{self._name} gave no sign of life for {timeout_s:g} s while {doing}"
                        f"{self._process.last_lines()}",
                        None,
                    )
        line, _, self._received = self._received.partition(b"\n")
        return decode_event(line)

    def _failure(self, event: Failed) -> BatchLLMError:
        died = event.engine_lost and not event.stopped and not self._loading
        kind = (EngineDiedError if died else TransientError) if event.transient else TerminalError
        reason = self._process.root_cause() if event.engine_lost and not event.transient else ""
        seen = " ".join(event.message.split())
        message = event.message if not reason or reason in seen else f"{seen}; {reason}"
        if not event.explained:
            message += self._process.last_lines()
        return kind(message, uri=event.uri, bundle=event.bundle)

    def _lost(self, doing: str) -> _EngineLostError:
        code = self._process.exit_code(_POLL_SECONDS * 10)
        how = "closed its channel" if code is None else f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return _EngineLostError(f"{self._name} died while {doing}: {how}{self._process.last_lines()}", code)

    def _closed(self) -> TerminalError:
        return TerminalError(f"{self._name} was closed")

    def _break(self) -> None:
        self._broken = True
        self._process.kill()

    def _ask_to_shut_down(self) -> None:
        try:
            # Without blocking: a stopped engine does not read, and the kill that follows is certain.
            self._channel.send(encode(Shutdown()), socket.MSG_DONTWAIT)
        except OSError:
            return
        self._process.exit_code(self._close_grace_s)


class _EngineLostError(Exception):
    """The process is dead or silent."""

    def __init__(self, message: str, exit_code: int | None) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class _End:
    """Why an engine gives no more events."""

    kind: type[BatchLLMError]
    message: str

    def error(self, bundle: str) -> BatchLLMError:
        return self.kind(self.message, bundle=bundle)
