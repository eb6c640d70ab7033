"""How far the execution of a plan is: counts in, rates and time left out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from batchllm_operators.execute.messages import BundleCounts
from batchllm_operators.records import BundleInfo, Record


class ProgressSnapshot(Record):
    """The state of a run at one moment; rates are since the first engine began to work."""

    requests: int
    """Answered so far, those with an error included."""
    requests_total: int
    errors: int
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were found in the KV cache and not computed."""
    completion_tokens: int
    fraction: float
    """Share of the work that is done, 0 to 1, weighed by the plan's estimated seconds."""
    working_seconds: float
    requests_per_second: float
    tokens_per_second: float
    """Prompt and completion tokens, cached ones included."""
    seconds_left: float | None
    """None before there is anything to estimate from."""

    @property
    def saving(self) -> float:
        """Share of the prompt tokens so far that was not computed."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class ProgressBoard:
    """Collects the counts of all bundles; safe to use from many threads.

    Args:
        bundles: the plan's bundles.
        clock: seconds, increasing.
    """

    def __init__(self, bundles: Iterable[BundleInfo], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._bundles = {bundle.name: bundle for bundle in bundles}
        self._counts = {name: BundleCounts() for name in self._bundles}
        self._clock = clock
        self._first: float | None = None
        self._lock = threading.Lock()

    def update(self, bundle: str, counts: BundleCounts) -> None:
        """Set the counts of a bundle since its start; a retried bundle may go back."""
        with self._lock:
            if bundle not in self._counts:
                raise ValueError(f"expected a bundle of the plan, got {bundle!r}")
            if self._first is None:
                self._first = self._clock()
            self._counts[bundle] = counts

    def snapshot(self) -> ProgressSnapshot:
        """Totals, rates and time left, now."""
        with self._lock:
            now = self._clock()
            working = 0.0 if self._first is None else now - self._first
            counts = sum(self._counts.values(), BundleCounts())
            fraction = self._fraction()
        rate = 1.0 / working if working > 0 else 0.0
        return ProgressSnapshot(
            requests=counts.requests,
            requests_total=sum(bundle.requests for bundle in self._bundles.values()),
            errors=counts.errors,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            completion_tokens=counts.completion_tokens,
            fraction=fraction,
            working_seconds=working,
            requests_per_second=counts.requests * rate,
            tokens_per_second=(counts.prompt_tokens + counts.completion_tokens) * rate,
            seconds_left=working * (1.0 - fraction) / fraction if fraction > 0 and working > 0 else None,
        )

    def _fraction(self) -> float:
        total = done = 0.0
        for name, bundle in self._bundles.items():
            total += bundle.expected_seconds
            done += bundle.expected_seconds * self._counts[name].requests / max(1, bundle.requests)
        return min(1.0, done / total) if total > 0 else 1.0
