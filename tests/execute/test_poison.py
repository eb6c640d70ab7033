"""Requests that kill the engine: it really is killed, over and over, until the guilty one stands alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from batchllm_operators.errors import EngineDiedError, TerminalError, TransientError
from batchllm_operators.execute.messages import BundleCounts
from tests.execute.engines import WatchedRuns

POISONED = 9
"""Number of the request that the engine does not survive; its prompt ends in token 2009."""


@pytest.fixture
def make_pool(work: Any) -> Iterator[Callable[[str], WatchedRuns]]:
    with ExitStack() as ending:

        def make(python: str) -> WatchedRuns:
            runs = WatchedRuns(work.engine_work(part_rows=2), python)
            ending.enter_context(runs.fleet)
            return runs

        yield make


def test_the_second_death_of_a_bundle_is_traced_to_one_request_and_all_others_are_answered(
    make_pool: Callable[[str], WatchedRuns], told_engine: Callable[..., str], work: Any
) -> None:
    bundle = work.write_bundle(requests=16)
    seen: list[BundleCounts] = []
    pool = make_pool(told_engine(poison=2000 + POISONED))
    with pytest.raises(EngineDiedError, match="killed by signal 9") as caught:
        pool.run(bundle)
    assert caught.value.bundle == bundle.name
    assert isinstance(caught.value, TransientError)

    result = pool.run(bundle, lambda _, counts: seen.append(counts))

    answers = work.answers(result.parts)
    assert list(answers) == list(range(16))
    verdict = answers.pop(POISONED)["error"]
    assert verdict["code"] == "engine_error"
    assert verdict["message"].startswith("the engine died on this request: engine")
    assert "killed by signal 9" in verdict["message"]
    assert all(row["error"] is None for row in answers.values())
    assert (result.requests, result.errors, result.completion_tokens) == (16, 1, 15 * 4)
    assert result.load_seconds > 0
    assert [counts.requests for counts in seen] == sorted(counts.requests for counts in seen)
    # Two deaths of the whole bundle, then one for each halving, and an engine for the rest.
    assert len(pool.links) <= 2 + 4 + 1
    # The pool goes on as if nothing had happened.
    assert pool.run(work.write_bundle("next", requests=4)).errors == 0


def test_where_no_engine_has_ever_answered_the_request_is_not_blamed(
    make_pool: Callable[[str], WatchedRuns], told_engine: Callable[..., str], work: Any
) -> None:
    bundle = work.write_bundle(requests=1)
    pool = make_pool(told_engine(poison=2000))
    with pytest.raises(EngineDiedError):
        pool.run(bundle)
    with pytest.raises(TerminalError, match=r"no engine of this run has answered anything.*signal 9"):
        pool.run(bundle)
    assert work.store.names("results") == []


def test_engines_that_die_on_everything_end_the_bundle_after_a_few_restarts(
    make_pool: Callable[[str], WatchedRuns], told_engine: Callable[..., str], work: Any
) -> None:
    bundle = work.write_bundle(requests=16)
    pool = make_pool(told_engine(poison=1000))  # it begins every prompt
    with pytest.raises(EngineDiedError):
        pool.run(bundle)
    with pytest.raises(TerminalError, match="engines seem to be at fault"):
        pool.run(bundle)
    assert len(pool.links) <= 2 + 4 + 8
    assert work.store.names("results") == []


def test_an_engine_that_is_told_to_end_puts_no_request_under_suspicion(
    make_pool: Callable[[str], WatchedRuns], told_engine: Callable[..., str], work: Any
) -> None:

    bundle = work.write_bundle(requests=200)
    pool = make_pool(told_engine(step_seconds=0.02))
    for _ in range(3):
        with pytest.raises(TransientError, match="told to stop") as caught:
            pool.run(bundle, lambda _, counts: os.kill(pool.links[-1].pid, signal.SIGTERM) if counts.requests else None)
        assert not isinstance(caught.value, EngineDiedError)
    result = pool.run(bundle)
    assert (result.requests, result.errors) == (200, 0)
    assert len(pool.links) == 4
