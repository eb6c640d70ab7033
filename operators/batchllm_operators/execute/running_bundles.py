"""The bundles that an engine computes now: fed without a gap, written as they finish, told of as they go."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from batchllm_operators.errors import BatchLLMError, TransientError
from batchllm_operators.execute.bundle_run import BundleRun
from batchllm_operators.execute.engine import Engine
from batchllm_operators.execute.feeding import BundleFeed
from batchllm_operators.execute.messages import BundleEvent, Failed, Run
from batchllm_operators.execute.step_traces import StepTraces

PROGRESS_SECONDS = 0.25


class RunningBundles:
    """Drives a loaded engine through its bundles; all methods are called by the engine's one thread.

    Args:
        engine: with its model loaded.
        tell: takes the events; called in the thread that writes parts too.
        traces: take the steps of the engine to the work folder; None: they are not traced.
    """

    def __init__(self, engine: Engine, tell: Callable[[BundleEvent], None], traces: StepTraces | None) -> None:
        self._engine = engine
        self._tell = tell
        self._traces = traces
        self._feed = BundleFeed(engine)
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="parts")
        self._runs: dict[str, BundleRun] = {}
        self._ending: list[BundleRun] = []
        self._last_done = 0.0
        self._told = 0.0
        self._computed_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether there is a bundle that is not done."""
        return bool(self._runs)

    def begin(self, command: Run) -> None:
        """Take a bundle, behind those it has; one that cannot be read fails alone."""
        try:
            run = BundleRun(command, self._tell, self._writing)
        except BatchLLMError as error:
            traceback.print_exc()
            transient = isinstance(error, TransientError)
            self._tell(
                Failed(
                    bundle=command.bundle, message=error.message, transient=transient, engine_lost=False, uri=error.uri
                )
            )
            return
        self._runs[run.name] = run
        self._feed.add(run.name, run.requests)

    def advance(self) -> None:
        """Make one step of the engine, and end the bundles that are done and written."""
        if not self._runs:
            return
        for step in self._feed.step():
            run = self._runs[step.bundle]
            try:
                run.take(step)
            except BatchLLMError as error:
                # A fault of the store: the engine is as good as before.
                traceback.print_exc()
                self._feed.drop(run.name)
                del self._runs[run.name]
                run.fail(error)
                continue
            if step.done:
                self._ending.append(run)
        self._end_written(wait=not self._feed.busy)
        self._tell_progress()

    def leave(self, message: str, *, stopped: bool, transient: bool = True) -> None:
        """Write what is finished, so that it is not computed again, and say of every bundle that it is not done.

        Args:
            message: why the engine ends.
            stopped: it was told to, and can still be spoken to; else it broke.
            transient: whether another engine may do better.
        """
        if stopped:
            self._feed.abort()
        faults = {}
        for run in self._runs.values():
            try:
                run.keep()
            except BatchLLMError as error:
                traceback.print_exc()
                faults[run.name] = f"{message}; what was finished could not be written: {error.message}"
        for name in self._runs:
            self._tell(
                Failed(
                    bundle=name,
                    message=faults.get(name, message),
                    transient=transient,
                    engine_lost=True,
                    stopped=stopped,
                    explained=stopped or not transient,
                )
            )

    def close(self) -> None:
        """Wait for the part that is being written, and write no other."""
        self._writing.shutdown(cancel_futures=True)

    def _end_written(self, *, wait: bool) -> None:
        """Say of bundles that they are done, once they are written; with `wait`, wait for that."""
        for run in [run for run in self._ending if wait or run.written]:
            self._ending.remove(run)
            del self._runs[run.name]
            try:
                if self._traces is not None:
                    self._traces.write(run.work, run.name)
                self._last_done = run.end(self._last_done)
            except BatchLLMError as error:
                traceback.print_exc()
                run.fail(error)

    def _tell_progress(self) -> None:
        """Tell of answers and, where there are none, that tokens are computed: a step alone is no sign of life."""
        now = time.monotonic()
        if now - self._told < PROGRESS_SECONDS or not self._runs:
            return
        computed = self._engine.computed_tokens
        news = [run for run in self._runs.values() if run.has_news]
        if computed != self._computed_tokens and not news:
            news = [next(iter(self._runs.values()))]
        for run in news:
            run.tell_progress()
        self._computed_tokens = computed
        self._told = now
