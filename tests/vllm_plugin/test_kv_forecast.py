"""The predicted peak of KV use against a simulation step by step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm_kernels.vllm_plugin.kv_forecast import MOMENTS, peak_blocks


@dataclass(frozen=True)
class Held:
    """What a request holds behind its full prompt blocks."""

    end: int
    tokens: int
    final_tokens: int


@dataclass(frozen=True)
class Run:
    blocks: int
    last: int


def requests(most_end: int) -> st.SearchStrategy[Held]:
    ends = st.integers(1, most_end)
    return st.builds(lambda end, tokens, more: Held(end, tokens, tokens + more), ends, st.integers(1, 40), ends)


def forecast(held: list[Held], runs: list[Run], block_size: int) -> int:
    columns = [(one.end, one.tokens, one.final_tokens) for one in held]
    ends, tokens, final = np.array(columns, dtype=np.int64).reshape(-1, 3).T
    blocks, last = np.array([(run.blocks, run.last) for run in runs], dtype=np.int64).reshape(-1, 2).T
    return peak_blocks(ends, tokens, final, blocks, last, block_size=block_size)


def simulated(held: list[Held], runs: list[Run], block_size: int) -> int:
    peak = 0
    for step in range(1, max(one.end for one in held) + 1):
        alive = [min(one.tokens + step - 1, one.final_tokens) for one in held if one.end >= step]
        own = sum(-(-tokens // block_size) for tokens in alive)
        peak = max(peak, own + sum(run.blocks for run in runs if run.last >= step))
    return peak


@st.composite
def caches(draw: st.DrawFn, least: int, most: int, most_end: int) -> tuple[list[Held], list[Run], int]:
    """Requests that end at different steps, the runs that some of them hold last, and a block size."""
    held = draw(st.lists(requests(most_end), min_size=least, max_size=most, unique_by=lambda one: one.end))
    ends = st.sampled_from([one.end for one in held])
    return held, draw(st.lists(st.builds(Run, st.integers(0, 9), ends), max_size=6)), draw(st.sampled_from([1, 3, 16]))


@settings(deadline=None)
@given(caches(least=1, most=30, most_end=MOMENTS))
def test_the_peak_is_exact_while_each_end_is_looked_at(cache: tuple[list[Held], list[Run], int]) -> None:
    assert forecast(*cache) == simulated(*cache)


@settings(deadline=None)
@given(caches(least=MOMENTS + 1, most=120, most_end=500))
def test_the_peak_is_never_forecast_too_low(cache: tuple[list[Held], list[Run], int]) -> None:
    assert forecast(*cache) >= simulated(*cache)


@settings(deadline=None)
@given(caches(least=MOMENTS + 1, most=120, most_end=500))
def test_neighbouring_ends_fall_together(cache: tuple[list[Held], list[Run], int]) -> None:
    held, runs, block_size = cache
    ends = sorted(one.end for one in held)
    last_ends = [ends[round(index)] for index in np.linspace(0, len(ends) - 1, MOMENTS)]
    together = [Held(next(end for end in last_ends if end >= one.end), one.tokens, one.final_tokens) for one in held]
    runs = [Run(run.blocks, next(end for end in last_ends if end >= run.last)) for run in runs]
    at_ends = [
        sum(-(-min(one.tokens + end - 1, one.final_tokens) // block_size) for one in together if one.end >= end)
        + sum(run.blocks for run in runs if run.last >= end)
        for end in last_ends
    ]
    assert forecast(*cache) == max(at_ends)


def test_without_requests_the_pinned_blocks_are_left() -> None:
    assert forecast([], [Run(3, 0), Run(4, 9)], 16) == 7
