"""What the engines do until their first tokens, told whenever it changes and again before it gets quiet for long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from batchllm_operators.execute.messages import Loading
from batchllm_operators.plan.markdown import duration

REPEAT_SECONDS = 10.0


@dataclass(slots=True)
class _Start:
    """An engine on its way to its first tokens."""

    loading: Loading
    begun: float
    """When it began to load, or to compute its first tokens."""
    phase_begun: float
    told: float
    """When a line was last written."""


class EngineStatus:
    """Writes a line for each phase of an engine's start, and one more whenever none was written for 10 s.

    Args:
        log: takes a line.
        clock: seconds, increasing.
        repeat_seconds: after so long without a line the phase is told again, with its seconds.

    A context manager whose thread repeats what goes on; `tell` may be called from any thread.
    """

    def __init__(
        self,
        log: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        repeat_seconds: float = REPEAT_SECONDS,
    ) -> None:
        self._log = log
        self._clock = clock
        self._repeat_seconds = repeat_seconds
        self._starts: dict[str, _Start] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def __enter__(self) -> EngineStatus:
        self._thread = threading.Thread(target=self._watch, name="engine-status", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def tell(self, engine: str, loading: Loading | None) -> None:
        """Say what an engine does now; None: it computes, or has ended."""
        with self._lock:
            if loading is None:
                self._starts.pop(engine, None)
                return
            now = self._clock()
            start = self._starts.get(engine)
            if start is None:
                start = self._starts[engine] = _Start(loading, now, now, now)
            elif start.loading.phase == loading.phase:
                start.loading = loading
                return
            else:
                start.loading, start.phase_begun, start.told = loading, now, now
            self._log(self._line(engine, start, now))

    def repeat(self) -> None:
        """Write a line for each engine of which none was written for long."""
        with self._lock:
            now = self._clock()
            for engine, start in self._starts.items():
                if now - start.told >= self._repeat_seconds:
                    start.told = now
                    self._log(self._line(engine, start, now))

    def line(self) -> str | None:
        """What the engines do now, on one line; None where all compute."""
        with self._lock:
            now = self._clock()
            return "; ".join(self._line(engine, start, now) for engine, start in self._starts.items()) or None

    def _watch(self) -> None:
        # Looks more often than it writes, so that no pause is much longer than wanted.
        while not self._stop.wait(min(self._repeat_seconds / 10, 1.0)):
            self.repeat()

    def _line(self, engine: str, start: _Start, now: float) -> str:
        pieces = [f"{engine}: {start.loading.phase}", start.loading.detail]
        if now > start.phase_begun:
            pieces.append(duration(now - start.phase_begun))
        line = ", ".join(piece for piece in pieces if piece)
        return line if start.phase_begun == start.begun else f"{line} ({duration(now - start.begun)} in all)"
