"""When requests end: together, they leave the cache half empty on average; one after the other, they keep it full.

Requests of one length that begin together hold little at first and all of the cache at last, and so do those that begin
when they have ended. Where ends are spread, what has ended makes room for what grows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

GROWTH = 2
"""Factor by which a request grows while it runs, below which it does not matter when it ends."""
ROUNDS = 2
"""Times that the waiting requests fill the cache, below which room that is left at first is not made up for."""
WINDOW = 0.15
"""Of a request's life, before and after its end: when not too many others may end."""
SHARE = 0.6
"""Of what the cache can hold in such a window: the work that may end in it."""


def ends_apart(
    to_come: Int64s, work: Int64s, *, first_blocks: int, last_blocks: int, waiting: int, capacity_blocks: int
) -> bool:
    """Whether a request may begin now without ending together with too many others.

    Args:
        to_come: int64 [R], output tokens that running requests will yet have, the candidate's in the last row.
        work: int64 [R], blocks times the steps that each keeps them.
        first_blocks: of the candidate when it begins.
        last_blocks: of the candidate when it ends.
        waiting: requests that wait, the candidate included.
        capacity_blocks: of the cache.
    """
    if last_blocks < GROWTH * first_blocks or waiting * (first_blocks + last_blocks) < 2 * ROUNDS * capacity_blocks:
        return True
    window = WINDOW * to_come[-1]
    others = work[:-1][np.abs(to_come[:-1] - to_come[-1]) < window].sum()
    return bool(others == 0 or others + work[-1] <= SHARE * 2 * window * capacity_blocks)
