"""Expected output lengths, corrected by the lengths that come in."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

WINDOW = 512
"""Finished requests that the correction looks back on."""
FEWEST = 16
"""Finished requests below which estimates are taken as they are."""
OVERRUN = 1.25
"""A request that outgrew all that is known of lengths is expected to grow by this factor once more."""
STEADY = 1.25
"""Factor between the errors of the tenth and the ninetieth percentile, up to which lengths count as known."""


class OutputEstimates:
    """Learns how far estimates are off, as actual over estimated length, and applies that to requests still running."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._ratios: npt.NDArray[np.float64] | None = None
        self._means_beyond: npt.NDArray[np.float64] = np.zeros(0)

    def observe(self, estimate: int, actual: int) -> None:
        """Take in a finished request's estimated and actual output tokens."""
        self._recent.append(actual / estimate)
        self._ratios = None

    def expected(self, estimates: Int64s, generated: Int64s, most: Int64s) -> Int64s:
        """Output tokens that requests will have had when they end: the mean over those that got at least as far.

        Args:
            estimates: int64 [R], the plan's expectations, at least 1.
            generated: int64 [R], tokens they have now.
            most: int64 [R], their `max_tokens`.

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
        """Whether estimates have turned out right, or off by much the same factor for nearly all."""
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
