"""Expected output lengths, corrected by the lengths of requests that have ended."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from batchllm_kernels.arrays import Int64s

WINDOW = 512
"""The correction is made from so many of the last finished requests."""
FEWEST = 16
"""With fewer finished requests than these, estimates are taken as they are."""
OVERRUN = 1.25
"""A request that is longer already than any that ended is expected to grow by this factor once more."""
STEADY = 1.25
"""Lengths count as known where the errors of the tenth and the ninetieth percentile are within this factor."""


class LearntEstimates:
    """Learns the ratio of actual to estimated lengths, and corrects the estimates of requests that still run by it."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._ratios: npt.NDArray[np.float64] | None = None
        self._means_beyond: npt.NDArray[np.float64] = np.zeros(0)

    def observe(self, estimate: int, actual: int) -> None:
        """Take in a finished request's estimated and actual output tokens."""
        self._recent.append(actual / estimate)
        self._ratios = None

    def expected(self, estimates: Int64s, generated: Int64s, most: Int64s) -> Int64s:
        """Output tokens that requests will have when they end: the mean over ended requests that got at least as far.

        Args:
            estimates: int64 [R], output tokens that the plan expects, at least 1.
            generated: int64 [R], output tokens that the requests have now.
            most: int64 [R], the `max_tokens` of each request.

        Returns:
            int64 [R], between `generated` and `most`.
        """
        expected = estimates.astype(np.float64)
        if len(self._recent) >= FEWEST:
            ratios = self._sorted_ratios()
            beyond = np.searchsorted(ratios, generated / estimates, side="right")
            expected *= np.append(self._means_beyond, 0.0)[beyond]
        overran = expected <= generated
        expected[overran] = generated[overran] * OVERRUN + 1
        return np.clip(np.rint(expected).astype(np.int64), generated, np.maximum(most, generated))

    @property
    def are_steady(self) -> bool:
        """Whether estimates have turned out right, or wrong by much the same factor for nearly all requests."""
        if len(self._recent) < FEWEST:
            return False
        ratios = self._sorted_ratios()
        tenth = len(ratios) // 10
        return bool(ratios[-1 - tenth] <= STEADY * ratios[tenth])

    def _sorted_ratios(self) -> npt.NDArray[np.float64]:
        if self._ratios is None:
            self._ratios = np.sort(np.array(self._recent))
            counts = np.arange(len(self._ratios), 0, -1)
            self._means_beyond = np.cumsum(self._ratios[::-1])[::-1] / counts
        return self._ratios
