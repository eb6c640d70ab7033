"""Which requests may begin now without ending together with too many others."""

from __future__ import annotations

import numpy as np

from batchllm_kernels.vllm_plugin.spread_ends import SHARE, WINDOW, ends_apart


def apart(
    running: list[int], candidate: int, *, first: int = 4, last: int = 20, waiting: int = 100, capacity: int = 200
) -> bool:
    """With running requests that have so many tokens to come, all of the candidate's size."""
    to_come = np.array([*running, candidate], dtype=np.int64)
    work = np.full(len(to_come), candidate * (first + last) // 2, dtype=np.int64)
    return ends_apart(to_come, work, first_blocks=first, last_blocks=last, waiting=waiting, capacity_blocks=capacity)


def test_no_more_work_ends_in_a_window_than_its_share_of_the_cache() -> None:
    most = int(SHARE * 2 * WINDOW * 200 / 12)  # requests of 12 blocks on average
    assert most == 3
    assert apart([300] * (most - 1), 300)
    assert not apart([300] * most, 300)


def test_ends_at_other_times_do_not_count() -> None:
    assert apart([240] * 20 + [360] * 20, 300)
    assert not apart([260] * 20, 300)


def test_a_request_that_is_too_large_for_any_window_may_begin_where_no_other_ends() -> None:
    assert apart([], 300, last=1000)
    assert not apart([300], 300, last=1000)


def test_it_does_not_matter_for_requests_that_hardly_grow_nor_when_few_wait() -> None:
    assert apart([300] * 50, 300, first=12)
    assert apart([300] * 50, 300, waiting=30)
