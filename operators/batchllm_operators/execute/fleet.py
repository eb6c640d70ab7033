"""The engines of one run: lent to the threads of bundles, started when first needed, replaced when dead."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

from batchllm_operators.errors import BatchLLMError, TerminalError
from batchllm_operators.execute.backends.base import EngineBackend, EngineLink, Place
from batchllm_operators.execute.driver import Deadlines, EngineDriver, StatusCallback, no_status
from batchllm_operators.execute.messages import Load, Loaded
from batchllm_operators.store import Store

THREADS_PER_ENGINE = 2
"""The threads that keep an engine busy: one feeds it, the other waits for its last requests of the bundle before."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lease:
    """An engine with its model loaded, for one thread."""

    driver: EngineDriver
    loaded: Loaded | None
    """What the load of the engine gave, for its first lease; None for the next ones."""
    waited_seconds: float
    """Seconds that were waited for the model to load, for the first lease; 0 for the next ones."""
    admit_next: Callable[[], None]
    """Lets another thread have the engine too, because it has room for the next bundle's requests."""


@dataclass(slots=True, eq=False)
class _Slot:
    """The engine of one place; the lock of its fleet guards it."""

    place: Place
    driver: EngineDriver | None = None
    loaded: bool = False
    """Whether the driver has loaded its model."""
    taken_by: object | None = None
    """The lease whose bundle is being read; None: the engine takes another bundle."""
    leases: int = 0
    """The leases that have not ended: the bundles that the engine computes."""
    untold: Loaded | None = None
    """What its load gave, as long as no lease has been told."""
    waited_seconds: float = 0.0
    """The seconds that threads have waited for its model, as long as no lease has been told."""
    loading: threading.Lock = field(default_factory=threading.Lock)
    """Held by the thread that makes the engine ready; the others wait for it."""

    @property
    def warm(self) -> bool:
        """Whether its model is loaded."""
        return self.driver is not None and self.loaded and self.driver.usable


class EngineFleet:
    """An engine for each place of a backend; a context manager that ends them all.

    An engine takes its next bundle as soon as it has been given all requests of the one before, so that it has no gap
    between them. For that there must be more threads than engines: `THREADS_PER_ENGINE` each.

    `close` may be called from any thread, and makes waiting threads raise `TerminalError` at once: tasks blocked in a
    thread cannot be interrupted in another way.

    Args:
        backend: where the engines live; the fleet closes it.
        deadlines: of each engine.
        on_status: told what the engines do until their first tokens.
        started: the engine of the first place, where it has been started before.
    """

    def __init__(
        self,
        backend: EngineBackend,
        deadlines: Deadlines,
        *,
        on_status: StatusCallback = no_status,
        started: EngineLink | None = None,
    ) -> None:
        self._backend = backend
        self._deadlines = deadlines
        self._on_status = on_status
        self._slots = [_Slot(place) for place in backend.places()]
        self._changed = threading.Condition()
        self._waiting_alone = 0
        self._closed = False
        self._background: list[threading.Thread] = []
        self._load_failure: TerminalError | None = None
        self._has_loaded = False
        self._warned_of: set[str] = set()
        if started is not None:
            self._slots[0].driver = self._driven(started)

    def __enter__(self) -> EngineFleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def engines(self) -> int:
        """The number of engines that can run at the same time."""
        return len(self._slots)

    def start(self) -> None:
        """Start the first engine, which imports its packages; no model is loaded.

        An engine that cannot be started is told by the first load, which tries again: there may be nothing to load.
        """
        slot = self._slots[0]
        with self._changed:
            self._refuse_when_useless()
            if slot.driver is None:
                try:
                    slot.driver = self._driven(self._backend.start(slot.place))
                except BatchLLMError as error:
                    _LOGGER.debug("%s could not be started ahead of its model: %s", slot.place.name, error)

    def preload(self, load: Load) -> None:
        """Begin to load the model on the first engine, while the caller goes on; bundles that need it wait for it.

        A model that cannot be loaded is told to the first bundle; an engine that died is replaced for it.
        """
        slot = self._slots[0]

        def load_ahead() -> None:
            try:
                self._make_ready(slot, load)
            except BatchLLMError as error:
                if not self._closed:
                    _LOGGER.warning("%s could not be loaded ahead of its first bundle: %s", slot.place.name, error)

        self._run_in_background(load_ahead, "preload")

    def load_one(self, load: Load) -> Loaded | None:
        """Load the model on a free engine, which stays warm; what its load gave, or None where it was warm already.

        Raises:
            TerminalError: the model does not load, or the fleet is closed.
            TransientError: the engine died while loading.
        """
        with self._taken(alone=True) as (slot, _):
            was_warm = slot.warm
            self._warm(slot, load)
            return None if was_warm else slot.untold

    @contextmanager
    def lease(self, load: Load, *, alone: bool = False) -> Iterator[Lease]:
        """Wait for an engine, load its model if need be, and keep it until the block ends or it admits the next.

        Args:
            load: what an engine loads that is not warm.
            alone: wait for an engine without bundles, and admit none beside.

        Raises:
            TerminalError: the model does not load, which is not tried twice; or the fleet is closed.
            TransientError: the engine died while loading.
        """
        with self._taken(alone=alone) as (slot, token):
            driver = self._warm(slot, load)
            with self._changed:
                loaded, slot.untold = slot.untold, None
                waited, slot.waited_seconds = slot.waited_seconds, 0.0

            def admit_next() -> None:
                if not alone:
                    self._open(slot, token)

            yield Lease(driver, loaded, waited, admit_next)

    def release(self) -> None:
        """Begin to end all engines, while the caller goes on; `close` waits until they have ended."""
        self._run_in_background(self.end_engines, "release")

    def end_engines(self) -> None:
        """End all engines, finished rows first; what they have logged stays until `close`."""
        with self._changed:
            self._closed = True
            drivers = [slot.driver for slot in self._slots if slot.driver is not None]
            self._changed.notify_all()
        with ThreadPoolExecutor(max_workers=max(1, len(drivers))) as closers:
            list(closers.map(lambda driver: driver.close(), drivers))

    def close(self, *, keep_logs: Store | None = None) -> list[str]:
        """End all engines; finished rows are written first. Safe to call more than once.

        Args:
            keep_logs: the work folder that takes the end of the engines' logs, where any was asked to load its model.

        Returns:
            Where the logs are kept; empty where they are not.
        """
        self.end_engines()
        for thread in self._background:
            if thread is not threading.current_thread():
                thread.join()
        kept = self._backend.keep_logs(keep_logs) if keep_logs is not None and self._has_loaded else []
        self._backend.close()
        return kept

    def _run_in_background(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=f"engines {name}", daemon=True)
        self._background.append(thread)
        thread.start()

    @contextmanager
    def _taken(self, *, alone: bool) -> Iterator[tuple[_Slot, object]]:
        token = object()
        slot = self._take(token, alone=alone)
        try:
            yield slot, token
        finally:
            with self._changed:
                slot.leases -= 1
                self._open(slot, token)

    def _take(self, token: object, *, alone: bool) -> _Slot:
        with self._changed:
            self._waiting_alone += alone
            try:
                self._changed.wait_for(lambda: self._closed or self._open_slots(alone=alone))
            finally:
                self._waiting_alone -= alone
            self._refuse_when_useless()
            # Least loaded first; prefer an already loaded engine.
            slot = min(self._open_slots(alone=alone), key=lambda slot: (slot.leases, not slot.warm))
            slot.taken_by = token
            slot.leases += 1
            self._changed.notify_all()
            return slot

    def _open_slots(self, *, alone: bool) -> list[_Slot]:
        # Who must be alone would wait for ever if the others went on sharing.
        if self._waiting_alone and not alone:
            return []
        return [slot for slot in self._slots if slot.taken_by is None and not (alone and slot.leases)]

    def _open(self, slot: _Slot, token: object) -> None:
        """Let another thread have a slot, unless one has it already."""
        with self._changed:
            if slot.taken_by is token:
                slot.taken_by = None
            self._changed.notify_all()

    def _refuse_when_useless(self) -> None:
        if self._closed:
            raise TerminalError("the engines of this run are closed")
        if self._load_failure is not None:
            raise self._load_failure

    def _warm(self, slot: _Slot, load: Load) -> EngineDriver:
        """The engine of a slot with its model loaded; the seconds until then are waited for."""
        if slot.warm and slot.driver is not None:
            return slot.driver
        started = time.monotonic()
        driver = self._make_ready(slot, load)
        slot.waited_seconds += time.monotonic() - started
        return driver

    def _make_ready(self, slot: _Slot, load: Load) -> EngineDriver:
        """Load the model on a slot's engine, on a new one where it is dead, unless another thread has just done so."""
        with slot.loading:
            with self._changed:
                self._refuse_when_useless()
                driver, loaded = slot.driver, slot.loaded
            if driver is not None and driver.usable and loaded:
                return driver
            if driver is not None and not driver.usable:
                driver.close()
                driver = None
            try:
                with self._changed:
                    self._refuse_when_useless()
                    slot.loaded, self._has_loaded = False, True
                    if driver is None:
                        driver = slot.driver = self._driven(self._backend.start(slot.place))
                slot.untold = driver.load(load)
            except BatchLLMError as error:
                if isinstance(error, TerminalError) and not self._closed:
                    self._load_failure = error
                raise
            slot.loaded = True
            self._warn_of_slow_settings(slot.untold)
            return driver

    def _driven(self, link: EngineLink) -> EngineDriver:
        return EngineDriver(link, self._deadlines, self._on_status)

    def _warn_of_slow_settings(self, loaded: Loaded) -> None:
        warnings = {setting.warning for setting in loaded.settings if setting.warning}
        for warning in sorted(warnings - self._warned_of):
            _LOGGER.warning(warning)
        self._warned_of |= warnings
