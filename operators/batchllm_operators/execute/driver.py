"""Drives one engine over its link: loads the model, runs bundles, and says in errors how an engine was lost."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from batchllm_operators.errors import BatchLLMError, EngineDiedError, TerminalError, TransientError
from batchllm_operators.execute.backends.base import Death, EngineLink
from batchllm_operators.execute.messages import (
    BundleDone,
    BundleEvent,
    EnginePhase,
    Event,
    Failed,
    Load,
    Loaded,
    Loading,
    Progress,
    Run,
    Shutdown,
    Started,
)

START_TIMEOUT_SECONDS = 120.0
CLOSE_GRACE_SECONDS = 10.0
DEATH_SECONDS = 2.0
"""The time in which an engine that sends no more events is found dead."""

_POLL_SECONDS = 0.2
_RUNNING = "running"
"""What an engine does once its model is loaded."""

_Awaited = TypeVar("_Awaited", Started, Loaded)

StatusCallback = Callable[[str, Loading | None], None]
"""Takes an engine's name and what it does before its first tokens; None: it computes them, or has ended."""


def no_status(_engine: str, _loading: Loading | None) -> None:
    """Pass over the status, because nobody watches the engines."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long an engine may be silent, in seconds."""

    load_s: float
    """The time to load the model."""
    stall_s: float
    """The time without a token computed, with bundles to compute, after which it counts as lost."""
    close_grace_s: float = CLOSE_GRACE_SECONDS
    """The time to write what is finished when it is closed."""


class EngineDriver:
    """Speaks to one engine; all methods may be called from any thread, `load` once and before `run`.

    Args:
        link: the connection to a started engine.
        deadlines: the times after which the engine counts as lost.
        on_status: called with what the engine does until its first tokens.

    Errors of `load` and `run`: `TransientError` when the engine or the store failed for now, and of these
    `EngineDiedError` when it died or fell silent over its bundles, with its exit code and the last lines of its log;
    `TerminalError` when the model cannot be loaded, with the reason, and when the driver is closed meanwhile. An engine
    that dies fails all bundles it has.
    """

    def __init__(self, link: EngineLink, deadlines: Deadlines, on_status: StatusCallback = no_status) -> None:
        self.link = link
        self._name = link.place.name
        self._deadlines = deadlines
        self._on_status = on_status
        self._doing = "starting"
        self._has_computed = False
        self._broken = False
        self._closing = threading.Event()
        self._killed = threading.Event()
        self._closed = threading.Lock()
        self._inboxes = _Inboxes()
        self._receiver = threading.Thread(target=self._receive, name=f"{self._name} events", daemon=True)
        self._receiver.start()

    @property
    def usable(self) -> bool:
        """Whether the engine takes commands: it is neither dead nor closed."""
        lost = self._broken or self._inboxes.ended or self._closing.is_set()
        return not lost and self.link.death() is None

    def load(self, command: Load) -> Loaded:
        """Wait until the engine is up, and load the model."""
        log = f"log: {self.link.log}" if self.link.log else ""
        self._on_status(self._name, Loading(phase=EnginePhase.ENVIRONMENT, detail=log))
        try:
            self._wait_for(Started, START_TIMEOUT_SECONDS)
            self._doing = "loading the model"
            self._send(command)
            loaded = self._wait_for(Loaded, self._deadlines.load_s)
        except BaseException:
            self._break()
            raise
        finally:
            self._on_status(self._name, None)
        self._doing = _RUNNING
        return loaded

    def run(self, command: Run) -> Generator[BundleEvent, None, None]:
        """Compute one bundle; several at a time are fed in the order in which their iterators are begun.

        Yields its events as they come; the last is `BundleDone`. Close the iterator, as `contextlib.closing` does: an
        engine that is left in the midst of a bundle is ended, because it would go on with it.
        """
        settled = False
        events = self._inboxes.open(command.bundle)
        try:
            self._send(command)
            if not self._has_computed:
                self._on_status(self._name, Loading(phase=EnginePhase.FIRST_TOKENS))
            while not settled:
                event = events.get()
                if not self._has_computed and not _only_begins(event):
                    self._has_computed = True
                    self._on_status(self._name, None)
                if isinstance(event, _End):
                    raise event.error(command.bundle)
                if isinstance(event, Failed):
                    settled = not event.engine_lost
                    raise self._failure_of_run(event)
                settled = isinstance(event, BundleDone)
                yield event
        finally:
            self._inboxes.close(command.bundle)
            # An engine that is being closed is still to write its finished rows.
            if not settled and not self._closing.is_set():
                self._break()

    def close(self) -> None:
        """End the engine, finished rows kept; calls that wait for it raise at once. More than once is harmless.

        Who waits for an engine that was lost before is told how it was lost, which decides who tries again.
        """
        with self._closed:
            if self._killed.is_set():
                return
            lost = not self.usable
            self._closing.set()
            closed = _End(TerminalError, f"{self._name} was closed")
            if not lost:
                self._inboxes.end(closed)
            try:
                if self._doing == _RUNNING and not lost:
                    self._send(Shutdown())
                    self.link.death(self._deadlines.close_grace_s)
            finally:
                self.link.kill()
                self._killed.set()
                self._receiver.join()
                self._inboxes.end(closed)
                self.link.close()

    def _wait_for(self, kind: type[_Awaited], timeout_s: float) -> _Awaited:
        events = self._inboxes.of_loading
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                event = events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TransientError(self._too_slow(timeout_s)) from None
            if isinstance(event, Loading):
                self._on_status(self._name, event)
            elif isinstance(event, _End):
                raise event.error_of_loading()
            elif isinstance(event, Failed):
                raise self._failure_of_load(event)
            elif isinstance(event, kind):
                return event
            else:
                told = type(event).__name__
                raise TerminalError(f"{self._name}: expected {kind.__name__} while {self._doing}, got {told}")

    def _send(self, command: Load | Run | Shutdown) -> None:
        # An engine that does not listen is dead, and whoever waits for its events is told so with the exit code.
        with suppress(OSError):
            self.link.send(command)

    def _receive(self) -> None:
        """Hand events to those who wait for them, until there are no more; runs in a thread of its own."""
        end: _End | None = None
        while end is None:
            try:
                event = self.link.receive(_POLL_SECONDS)
                if event is not None:
                    self._inboxes.put(event)
                elif (death := self.link.death()) is not None:
                    # Not only the end of the events counts: a forked child of a dead engine can keep them open.
                    end = self._lost(death)
                elif self._killed.is_set():
                    return
                elif self._inboxes.silent_seconds() > self._deadlines.stall_s:
                    end = _End(EngineDiedError, self._silent(self._deadlines.stall_s))
            except (EOFError, OSError):
                end = self._lost(self.link.death(DEATH_SECONDS))
            except ValueError as error:
                end = _End(TerminalError, f"{self._name} said what is no event: {error}")
            except Exception as error:  # whatever a backend raises: those who wait must not wait for ever
                failed = f"its link failed with {type(error).__name__}: {error}"
                end = _End(EngineDiedError, f"{self._name} was lost while {self._doing}: {failed}")
        self._inboxes.end(end)

    def _silent(self, timeout_s: float) -> str:
        """End an engine without signs of life; returns what it is told by."""
        return self._ended(f"gave no sign of life for {timeout_s:g} s while {self._doing}")

    def _too_slow(self, timeout_s: float) -> str:
        """End an engine that is not ready in time, though it may have told of its progress; returns the message."""
        return self._ended(f"was not ready after {timeout_s:g} s of {self._doing}")

    def _ended(self, what: str) -> str:
        """End the engine; returns a message of what it did, why, and its last words."""
        why = self.link.silence()
        self._break()
        death = self.link.death(DEATH_SECONDS)
        return f"{self._name} {what}{f' ({why})' if why else ''}{death.log_tail if death else ''}"

    def _lost(self, death: Death | None) -> _End:
        if death is None:
            return _End(EngineDiedError, f"{self._name} died while {self._doing}: closed its channel")
        cause = f" ({death.cause})" if death.cause else ""
        message = f"{self._name} died while {self._doing}: {death.how}{cause}{death.log_tail}"
        return _End(EngineDiedError, message, death.exit_code)

    def _failure_of_load(self, event: Failed) -> BatchLLMError:
        self._break()
        return self._failure(event, TransientError if event.transient else TerminalError)

    def _failure_of_run(self, event: Failed) -> BatchLLMError:
        if event.engine_lost:
            # It ends by itself, after it has told its other bundles why: killed now, it could not.
            self._broken = True
            self.link.death(self._deadlines.close_grace_s)
        if not event.transient:
            return self._failure(event, TerminalError)
        died = event.engine_lost and not event.stopped
        return self._failure(event, EngineDiedError if died else TransientError)

    def _failure(self, event: Failed, kind: type[BatchLLMError]) -> BatchLLMError:
        death = self.link.death(DEATH_SECONDS) if event.engine_lost else None
        message = event.message
        if death is not None and not event.transient:
            seen = " ".join(message.split())
            if death.root_cause and death.root_cause not in seen:
                message = f"{seen}; {death.root_cause}"
        ended = death or self.link.death()
        if ended is not None and ended.cause:
            message += f" ({ended.cause})"
        if death is not None and not event.explained:
            message += death.log_tail
        return kind(message, uri=event.uri, bundle=event.bundle)

    def _break(self) -> None:
        self._broken = True
        self.link.kill()


@dataclass(frozen=True, slots=True)
class _End:
    """Why an engine gives no more events."""

    kind: type[BatchLLMError]
    message: str
    exit_code: int | None = None
    """The exit code of its process, where it died; None: not known, or it has not died."""

    def error(self, bundle: str) -> BatchLLMError:
        """The error of a bundle that the engine had when it ended."""
        return self.kind(self.message, bundle=bundle)

    def error_of_loading(self) -> BatchLLMError:
        """The error of the load that the engine's end cut off."""
        if self.kind is TerminalError:
            return TerminalError(self.message)
        # A process that ends by itself lacks something; one that was killed may do better the next time.
        ended_by_itself = self.exit_code is not None and self.exit_code >= 0
        return (TerminalError if ended_by_itself else TransientError)(self.message)

    def error_of_the_next(self, bundle: str) -> BatchLLMError:
        """The error of a bundle that was handed over after the engine had ended, and so is not to blame for it."""
        kind = TransientError if self.kind is EngineDiedError else self.kind
        return kind(self.message, bundle=bundle)


class _Inboxes:
    """The events of one engine by bundle, and when it was last heard; may be used from any thread."""

    def __init__(self) -> None:
        self.of_loading: queue.SimpleQueue[Event | _End] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._of_bundles: dict[str, queue.SimpleQueue[BundleEvent | _End]] = {}
        self._end: _End | None = None
        self._heard_at = 0.0

    @property
    def ended(self) -> bool:
        """Whether there will be no more events."""
        return self._end is not None

    def open(self, bundle: str) -> queue.SimpleQueue[BundleEvent | _End]:
        """The events of a bundle from now on.

        Raises:
            BatchLLMError: there will be no more events.
            ValueError: somebody has the events of this bundle already.
        """
        events: queue.SimpleQueue[BundleEvent | _End] = queue.SimpleQueue()
        with self._lock:
            if self._end is not None:
                raise self._end.error_of_the_next(bundle)
            if bundle in self._of_bundles:
                raise ValueError(f"expected another bundle, got {bundle} twice at a time")
            if not self._of_bundles:
                self._heard_at = time.monotonic()
            self._of_bundles[bundle] = events
        return events

    def close(self, bundle: str) -> None:
        """Drop the events of a bundle."""
        with self._lock:
            del self._of_bundles[bundle]

    def put(self, event: Event) -> None:
        """Hand an event to whom it concerns; one that concerns nobody any more is a sign of life only."""
        with self._lock:
            self._heard_at = time.monotonic()
            if not isinstance(event, BundleEvent) or event.bundle is None:
                self.of_loading.put(event)
            elif event.bundle in self._of_bundles:
                self._of_bundles[event.bundle].put(event)

    def end(self, end: _End) -> None:
        """Say that there will be no more events; the first reason counts."""
        with self._lock:
            self._end = self._end or end
            self.of_loading.put(self._end)
            for events in self._of_bundles.values():
                events.put(self._end)

    def silent_seconds(self) -> float:
        """Seconds since the engine was last heard; it may be silent for ever where it has no bundle."""
        with self._lock:
            return time.monotonic() - self._heard_at if self._of_bundles else -math.inf


def _only_begins(event: BundleEvent | _End) -> bool:
    return isinstance(event, Progress) and not event.computed
