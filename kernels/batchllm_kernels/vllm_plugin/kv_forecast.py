"""How many KV blocks the requests of an engine will need at the worst moment from now on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

MOMENTS = 64
"""Intervals of the future that are looked at one by one; with more ends than that, neighbouring ones fall together."""


def peak_blocks(
    ends: Int64s, tokens: Int64s, final_tokens: Int64s, run_blocks: Int64s, run_last: Int64s, *, block_size: int
) -> int:
    """The peak of the blocks in use, when every request gets one token a step and frees its blocks at its end.

    Exact up to `MOMENTS` different ends; beyond, an upper bound that counts the requests of an interval as alive until
    the interval ends. After the Past-Future scheduler (Gong et al., ASPLOS 2025), with shared blocks counted once.

    Args:
        ends: int64 [R], last step in which each request holds its blocks; the next step is 1.
        tokens: int64 [R], its tokens behind its full prompt blocks whose KV the next step needs.
        final_tokens: int64 [R], the same in its last step; no more than these are ever stored.
        run_blocks: int64 [S], full prompt blocks by run, each block in one run.
        run_last: int64 [S], last step in which a run is held.
        block_size: tokens of a block.
    """
    if len(ends) == 0:
        return int(run_blocks.sum())
    moments = np.unique(ends)
    if len(moments) > MOMENTS:
        moments = moments[np.linspace(0, len(moments) - 1, MOMENTS).round().astype(np.int64)]
    starts = np.concatenate([[1], moments[:-1] + 1])[:, None]
    stored = np.minimum(tokens + moments[:, None] - 1, final_tokens)
    own = np.where(ends >= starts, -(-stored // block_size), 0).sum(axis=1)
    shared = np.where(run_last >= starts, run_blocks, 0).sum(axis=1)
    return int((own + shared).max())
