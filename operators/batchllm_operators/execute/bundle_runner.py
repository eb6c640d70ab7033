"""Bundles on engines: attempts, deaths, the search for a request on which engines die, and the result."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from batchllm_operators.errors import EngineDiedError, RowError, RowErrorCode, TerminalError
from batchllm_operators.execute.engine_work import EngineWork
from batchllm_operators.execute.feeding import known_results
from batchllm_operators.execute.fleet import EngineFleet
from batchllm_operators.execute.isolation import find_guilty
from batchllm_operators.execute.messages import AllRead, BundleCounts, BundleDone, PartWritten, Progress
from batchllm_operators.records import BundleInfo, BundleResult, EngineLoad
from batchllm_operators.store import Store
from batchllm_operators.tasks import Answer, task_named
from batchllm_operators.work.bundles import bundle_keys, check_bundle
from batchllm_operators.work.results import answers_table, encoded_part

DEATHS_OF_A_BUNDLE = 2
"""Engines that may die on a bundle before one of its requests is taken to be the reason."""

ProgressCallback = Callable[[str, BundleCounts], None]
"""Takes a bundle's name and its counts so far."""


@dataclass(slots=True)
class _History:
    """What all attempts at a bundle have given, and what they took."""

    parts: list[str] = field(default_factory=list)
    """The result parts that are visible."""
    deaths: int = 0
    """Engines that died on it."""
    loads: list[EngineLoad] = field(default_factory=list)
    """Loads of the engines that were first lent to this bundle."""
    waited_seconds: float = 0.0
    """Seconds it waited for engines to load."""
    seconds: float = 0.0
    """Seconds of the engines' work that was not lost."""


class BundleRunner:
    """Computes the bundles of one plan; `run` may be called from as many threads as there are engines, twice over.

    Args:
        fleet: the engines.
        work: what they load, and how they compute.
        on_progress: called with a bundle's name and its counts so far, in the thread that runs it.
        proven: whether an engine of this run has answered a request before; an engine that never did is at fault
            itself where it dies.
    """

    def __init__(
        self, fleet: EngineFleet, work: EngineWork, on_progress: ProgressCallback, *, proven: bool = False
    ) -> None:
        self._fleet = fleet
        self._engine_work = work
        self._work = Store(work.work_uri, work.storage)
        self._task = task_named(work.load.task)
        self._on_progress = on_progress
        self._proven = threading.Event()
        if proven:
            self._proven.set()
        self._histories: defaultdict[str, _History] = defaultdict(_History)

    @property
    def work(self) -> EngineWork:
        """What the engines load, and how they compute."""
        return self._engine_work

    def run(self, bundle: BundleInfo) -> BundleResult:
        """Compute a bundle on the next free engine.

        A bundle that failed before goes on behind the parts its engine had written; the result covers all of it. Where
        an engine dies on a bundle for the second time, one of its requests is taken to be the reason, and this call
        finds it: it computes the unfinished requests in halves, on new engines, until the guilty one stands alone. Its
        answer is an `engine_error`.

        Args:
            bundle: its object is read where the engine is.

        Raises:
            TransientError: the engine died or stalled for the first time, or the store failed for now.
            TerminalError: the model does not load, the bundle cannot be read, engines die on too many requests, or the
                fleet is closed.
        """
        history = self._histories[bundle.name]
        if history.deaths < DEATHS_OF_A_BUNDLE:
            try:
                done = self._compute(bundle, history)
                return _result(bundle, history, done.counts)
            except EngineDiedError:
                history.deaths += 1
                if history.deaths < DEATHS_OF_A_BUNDLE:
                    raise
        self._isolate(bundle, history)
        _, counts = known_results(self._work, self._task, history.parts)
        return _result(bundle, history, counts)

    def _compute(self, bundle: BundleInfo, history: _History, rows: tuple[int, int] | None = None) -> BundleDone:
        """Compute a bundle, or some rows of it; these alone in the engine, so that its death is their fault."""
        command = self._engine_work.run_command(bundle, rows, tuple(history.parts))
        with self._fleet.lease(self._engine_work.load, alone=rows is not None) as lease:
            history.waited_seconds += lease.waited_seconds
            if lease.loaded is not None:
                history.loads.append(EngineLoad(seconds=lease.loaded.seconds, settings=lease.loaded.settings))
            with closing(lease.driver.run(command)) as events:
                for event in events:
                    if isinstance(event, Progress):
                        self._on_progress(event.bundle, event.counts)
                    elif isinstance(event, PartWritten):
                        history.parts.append(event.name)
                    elif isinstance(event, AllRead):
                        lease.admit_next()
                    elif isinstance(event, BundleDone):
                        history.seconds += event.seconds
                        if event.counts.requests > event.counts.errors:
                            self._proven.set()
                        return event
        raise RuntimeError("a driver's events end with BundleDone or an error")

    def _isolate(self, bundle: BundleInfo, history: _History) -> None:
        """Answer all requests of a bundle that can be answered, and say of the others that engines die on them."""
        done, _ = known_results(self._work, self._task, history.parts)
        check_bundle(self._work, bundle.name, bundle.digest)
        keys = bundle_keys(self._work, bundle.name)
        unfinished = [row for row, key in enumerate(keys) if key not in done]

        def compute(first: int, stop: int) -> None:
            self._compute(bundle, history, (first, stop))

        guilty = find_guilty(unfinished, compute)
        if not guilty:
            return
        _, counts = known_results(self._work, self._task, history.parts)
        if not self._proven.is_set() and counts.requests == counts.errors:
            raise TerminalError(
                f"no engine of this run has answered anything: {guilty[0].error.message}", bundle=bundle.name
            )
        name, content = encoded_part(answers_table(self._task, [_verdict(keys[one.row], one.error) for one in guilty]))
        self._work.write_bytes(name, content)
        history.parts.append(name)


def _result(bundle: BundleInfo, history: _History, counts: BundleCounts) -> BundleResult:
    return BundleResult(
        bundle=bundle.name,
        requests=counts.requests,
        errors=counts.errors,
        prompt_tokens=counts.prompt_tokens,
        cached_tokens=counts.cached_tokens,
        completion_tokens=counts.completion_tokens,
        parts=tuple(history.parts),
        load_seconds=history.waited_seconds,
        loads=tuple(history.loads),
        seconds=history.seconds,
    )


def _verdict(key: bytes, error: EngineDiedError) -> Answer:
    how = error.message.splitlines()[0].partition(";")[0]
    return Answer(key, error=RowError(RowErrorCode.ENGINE_ERROR, f"the engine died on this request: {how}"))
