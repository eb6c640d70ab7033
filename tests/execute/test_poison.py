"""Requests that kill the engine: it really is killed, over and over, until the guilty one stands alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from batchllm_operators.errors import TerminalError, TransientError
from batchllm_operators.execute.handle import LocalEngineHandle
from batchllm_operators.execute.isolation import EngineDiedError
from batchllm_operators.execute.messages import BundleCounts
from batchllm_operators.execute.pool import EnginePool
from batchllm_operators.specs.execution import ExecutionSpec, ModelSpec
from batchllm_operators.specs.sampling import SamplingParameters

POISONED = 9
"""Number of the request that the engine does not survive; its prompt ends in token 2009."""


def nothing(*_: object) -> None:
    return None


@pytest.fixture
def handles() -> list[LocalEngineHandle]:
    return []


@pytest.fixture
def make_pool(
    work: Any, make_handle: Callable[..., LocalEngineHandle], handles: list[LocalEngineHandle]
) -> Iterator[Callable[..., EnginePool]]:
    pools: list[EnginePool] = []

    def make(python: str, **changes: Any) -> EnginePool:
        def handle(_index: int) -> LocalEngineHandle:
            handles.append(make_handle(python=python, **changes))
            return handles[-1]

        pools.append(
            EnginePool(
                model=ModelSpec(id="m"),
                execution=ExecutionSpec(part_rows=2),
                block_size=32,
                sampling=SamplingParameters(),
                work=work.store,
                make_handle=handle,
            )
        )
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def test_the_second_death_of_a_bundle_is_traced_to_one_request_and_all_others_are_answered(
    make_pool: Callable[..., EnginePool], told_engine: Callable[..., str], work: Any, handles: list[LocalEngineHandle]
) -> None:
    bundle = work.write_bundle(requests=16)
    seen: list[BundleCounts] = []
    pool = make_pool(told_engine(poison=2000 + POISONED))
    with pytest.raises(EngineDiedError, match="killed by signal 9") as caught:
        pool.run_bundle(bundle, nothing)
    assert caught.value.bundle == bundle.name
    assert isinstance(caught.value, TransientError)

    result = pool.run_bundle(bundle, lambda _, counts: seen.append(counts))

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
    assert len(handles) <= 2 + 4 + 1
    # The pool goes on as if nothing had happened.
    assert pool.run_bundle(work.write_bundle("next", requests=4), nothing).errors == 0


def test_where_no_engine_has_ever_answered_the_request_is_not_blamed(
    make_pool: Callable[..., EnginePool], told_engine: Callable[..., str], work: Any
) -> None:
    bundle = work.write_bundle(requests=1)
    pool = make_pool(told_engine(poison=2000))
    with pytest.raises(EngineDiedError):
        pool.run_bundle(bundle, nothing)
    with pytest.raises(TerminalError, match=r"no engine of this run has answered anything.*signal 9"):
        pool.run_bundle(bundle, nothing)
    assert work.store.names("results") == []


def test_engines_that_die_on_everything_end_the_bundle_after_a_few_restarts(
    make_pool: Callable[..., EnginePool], told_engine: Callable[..., str], work: Any, handles: list[LocalEngineHandle]
) -> None:
    bundle = work.write_bundle(requests=16)
    pool = make_pool(told_engine(poison=1000))  # it begins every prompt
    with pytest.raises(EngineDiedError):
        pool.run_bundle(bundle, nothing)
    with pytest.raises(TerminalError, match="engines seem to be at fault"):
        pool.run_bundle(bundle, nothing)
    assert len(handles) <= 2 + 4 + 8
    assert work.store.names("results") == []


def test_an_engine_that_is_told_to_end_puts_no_request_under_suspicion(
    make_pool: Callable[..., EnginePool], told_engine: Callable[..., str], work: Any, handles: list[LocalEngineHandle]
) -> None:

    bundle = work.write_bundle(requests=200)
    pool = make_pool(told_engine(step_seconds=0.02))
    for _ in range(3):
        with pytest.raises(TransientError, match="told to stop") as caught:
            pool.run_bundle(
                bundle, lambda _, counts: os.kill(handles[-1].pid or 0, signal.SIGTERM) if counts.requests else None
            )
        assert not isinstance(caught.value, EngineDiedError)
    result = pool.run_bundle(bundle, nothing)
    assert (result.requests, result.errors) == (200, 0)
    assert len(handles) == 4
