"""Spreads the ends of requests over time, which keeps the cache fuller.

Requests of one length that begin together hold little at first and all of the cache at last. They end together, and the
requests after them begin together again: on average half of the cache is empty. Where ends are spread, a request that
ends makes room for the others to grow.
"""

from __future__ import annotations

import numpy as np

from batchllm_kernels.arrays import Int64s

GROWTH = 2
"""Where a request grows by less than this factor while it runs, it does not matter when it ends."""
ROUNDS = 2
"""Where the waiting requests fill the cache fewer times than this, room that is left at first is never made up for."""
WINDOW = 0.15
"""Not too many requests may end within one window: this share of a request's life before its end, and after it."""
SHARE = 0.6
"""The work (blocks times steps) that may end in one window, as a share of what the cache can hold meanwhile."""


def ends_apart(
    to_come: Int64s, work: Int64s, *, first_blocks: int, last_blocks: int, waiting: int, capacity_blocks: int
) -> bool:
    """Whether a request may begin now without ending together with too many others.

    Args:
        to_come: int64 [R], output tokens that running requests will yet have; the last row is the candidate's.
        work: int64 [R], blocks of each request times the steps that it keeps them.
        first_blocks: blocks of the candidate when it begins.
        last_blocks: blocks of the candidate when it ends.
        waiting: how many requests wait, the candidate included.
        capacity_blocks: blocks of the cache.
    """
    if last_blocks < GROWTH * first_blocks or waiting * (first_blocks + last_blocks) < 2 * ROUNDS * capacity_blocks:
        return True
    window = WINDOW * to_come[-1]
    others = work[:-1][np.abs(to_come[:-1] - to_come[-1]) < window].sum()
    return bool(others == 0 or others + work[-1] <= SHARE * 2 * window * capacity_blocks)
