"""Engines of each backend, with a driver each, for the tests of what a backend promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from batchllm_operators.execute.backends.base import EngineBackend, EngineLink, Place
from batchllm_operators.execute.backends.inline import InlineBackend, ScriptedMaker
from batchllm_operators.execute.backends.local import LocalBackend, LocalLink
from batchllm_operators.execute.bundle_runner import BundleRunner, ProgressCallback
from batchllm_operators.execute.driver import Deadlines, EngineDriver, StatusCallback, no_status
from batchllm_operators.execute.engine_work import EngineWork
from batchllm_operators.execute.fleet import EngineFleet
from batchllm_operators.execute.messages import BundleCounts, BundleDone, BundleEvent, Run
from batchllm_operators.records import BundleInfo, BundleResult
from tests.execute.told_engine import told_maker


@dataclass
class StartedEngine:
    """An engine that a backend has started, and its driver."""

    driver: EngineDriver
    link: EngineLink

    @property
    def pid(self) -> int:
        """The process id of a local engine, which is that of its group too."""
        assert isinstance(self.link, LocalLink)
        return self.link.pid

    def run(self, command: Run, on_event: Callable[[BundleEvent], object] = lambda _: None) -> BundleDone:
        """Compute a bundle and see its events."""
        with closing(self.driver.run(command)) as events:
            for event in events:
                on_event(event)
                if isinstance(event, BundleDone):
                    return event
        raise AssertionError("expected BundleDone as the last event")


@contextmanager
def started_engine(
    backend: EngineBackend, *, on_status: StatusCallback = no_status, **deadlines: float
) -> Iterator[StartedEngine]:
    """An engine that is started and not loaded, until the block ends."""
    try:
        link = backend.start(backend.places()[0])
        driver = EngineDriver(link, Deadlines(**{"load_s": 300.0, "stall_s": 60.0, **deadlines}), on_status)
        try:
            yield StartedEngine(driver, link)
        finally:
            driver.close()
    finally:
        backend.close()


def local_backend(python: str | None = None, engines: int = 1) -> LocalBackend:
    """Engine processes that share all devices."""
    return LocalBackend([Place(index=index) for index in range(engines)], python)


class WatchedBackend(LocalBackend):
    """Engine processes that share all devices, whose links the test can see."""

    def __init__(self, python: str | None = None, engines: int = 1) -> None:
        super().__init__([Place(index=index) for index in range(engines)], python)
        self.links: list[LocalLink] = []

    def start(self, place: Place) -> LocalLink:
        self.links.append(super().start(place))
        return self.links[-1]


def local_engine(python: str | None = None, **settings: Any) -> Any:
    """`started_engine` of a process on this machine."""
    return started_engine(local_backend(python), **settings)


def inline_backend(engines: int = 1, **script: Any) -> InlineBackend:
    """Engines in threads that do as these settings say, see `told_engine.py`."""

    def maker(_place: Place) -> ScriptedMaker:
        told = told_maker(script)
        return ScriptedMaker(told.script)

    return InlineBackend(engines, maker)


class WatchedRuns:
    """Runs bundles on a fleet of one engine process; sees its links, and the progress of each bundle."""

    def __init__(self, told: EngineWork, python: str | None = None, stall_s: float = 60.0) -> None:
        backend = WatchedBackend(python)
        self.links = backend.links
        self.fleet = EngineFleet(backend, Deadlines(300, stall_s))
        self._on_progress: ProgressCallback = _nothing
        self._runner = BundleRunner(self.fleet, told, self._see)

    def run(self, bundle: BundleInfo, on_progress: ProgressCallback | None = None) -> BundleResult:
        self._on_progress = on_progress or _nothing
        return self._runner.run(bundle)

    def _see(self, bundle: str, counts: BundleCounts) -> None:
        self._on_progress(bundle, counts)


def _nothing(_bundle: str, _counts: BundleCounts) -> None:
    """Where no test looks."""
