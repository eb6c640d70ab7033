"""How many KV blocks the requests of an engine will need at the worst moment from now on."""

from __future__ import annotations

import numpy as np

from batchllm_kernels.arrays import Int64s

MOMENTS = 64
"""Most intervals that the future is divided into; where requests end in more steps than that, neighbouring ends are
taken as one."""


def peak_blocks(
    ends: Int64s, tokens: Int64s, final_tokens: Int64s, run_blocks: Int64s, run_last: Int64s, *, block_size: int
) -> int:
    """Most blocks in use at any time, when every request gets one token a step and frees its blocks at its end.

    Exact up to `MOMENTS` different ends; beyond, an upper bound that counts the requests of an interval as alive until
    the interval ends. After the Past-Future scheduler (Gong et al., ASPLOS 2025), with shared blocks counted once.

    Args:
        ends: int64 [R], last step in which each request holds its blocks; the next step is 1.
        tokens: int64 [R], tokens of each request behind its full prompt blocks whose KV the next step needs.
        final_tokens: int64 [R], the same in the last step of the request; no more than these are ever stored.
        run_blocks: int64 [S], full prompt blocks of each run; each block is in one run.
        run_last: int64 [S], last step in which each run is held.
        block_size: tokens of a block.
    """
    if len(ends) == 0:
        return int(run_blocks.sum())
    moments = np.unique(ends)
    if len(moments) > MOMENTS:
        moments = moments[np.linspace(0, len(moments) - 1, MOMENTS).round().astype(np.int64)]
    # How many intervals each request is alive in, and through how many of them, from the first on, it keeps growing.
    alive = _intervals_begun(moments, ends)
    growing = np.minimum(moments.searchsorted(final_tokens - tokens + 1, side="right"), alive)
    final_blocks = -(-final_tokens // block_size)
    own = _until(alive, final_blocks, len(moments)) - _until(growing, final_blocks, len(moments))
    # Requests whose last token stands at the same place of a block fill that block in the same step, so they are
    # counted together.
    full, place = np.divmod(tokens - 1, block_size)
    counts = np.bincount(growing * block_size + place, minlength=(len(moments) + 1) * block_size)
    at_place = counts.reshape(-1, block_size)[::-1].cumsum(axis=0)[-2::-1]
    further = -(-(np.arange(block_size) + moments[:, None]) // block_size)
    own += _until(growing, full, len(moments)) + (at_place * further).sum(axis=1)
    return int((own + _until(_intervals_begun(moments, run_last), run_blocks, len(moments))).max())


def _intervals_begun(moments: Int64s, last: Int64s) -> Int64s:
    """How many of the intervals that end at `moments` have begun by each of the steps `last`, int64 [N].

    The first interval begins with step 1.
    """
    return np.where(last > 0, moments[:-1].searchsorted(last, side="left") + 1, 0)


def _until(intervals: Int64s, blocks: Int64s, count: int) -> Int64s:
    """Blocks in use in each of `count` intervals, int64 [count]: `blocks[i]` in each of the first `intervals[i]`."""
    ends = np.bincount(intervals, weights=blocks, minlength=count + 1)  # float64, exact below 2**53
    return ends[:0:-1].cumsum()[::-1].astype(np.int64)
