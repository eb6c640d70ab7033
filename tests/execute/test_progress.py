from __future__ import annotations

import threading

import pytest

from batchllm_operators.execute.messages import BundleCounts
from batchllm_operators.execute.progress import ProgressBoard
from batchllm_operators.records import BundleInfo


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def bundle(name: str, requests: int, seconds: float) -> BundleInfo:
    return BundleInfo(
        name=name,
        requests=requests,
        groups=1,
        prompt_tokens=100 * requests,
        expected_computed_prompt_tokens=50 * requests,
        expected_output_tokens=10 * requests,
        expected_seconds=seconds,
    )


def counts(requests: int, errors: int = 0) -> BundleCounts:
    return BundleCounts(
        requests=requests,
        errors=errors,
        prompt_tokens=100 * requests,
        cached_tokens=60 * requests,
        completion_tokens=20 * requests,
    )


def test_before_the_first_engine_works_there_is_nothing_to_estimate_from() -> None:
    snapshot = ProgressBoard([bundle("a", 10, 5.0)]).snapshot()
    assert (snapshot.requests, snapshot.requests_total, snapshot.fraction) == (0, 10, 0.0)
    assert snapshot.seconds_left is None
    assert snapshot.tokens_per_second == 0.0
    assert snapshot.saving == 0.0


def test_rates_and_time_left_count_from_the_first_sign_of_work() -> None:
    clock = Clock()
    board = ProgressBoard([bundle("long", 10, 30.0), bundle("short", 90, 10.0)], clock=clock)
    clock.now += 500  # loading
    board.update("long", counts(0))
    clock.now += 4
    board.update("long", counts(2))
    board.update("short", counts(18, errors=3))
    snapshot = board.snapshot()
    assert (snapshot.requests, snapshot.requests_total, snapshot.errors) == (20, 100, 3)
    assert snapshot.working_seconds == 4
    assert snapshot.requests_per_second == 5
    assert snapshot.tokens_per_second == 20 * 120 / 4
    assert snapshot.fraction == pytest.approx(0.2)
    assert snapshot.seconds_left == pytest.approx(16)
    assert snapshot.saving == pytest.approx(0.6)


def test_time_left_is_weighed_by_the_expected_seconds_not_by_requests() -> None:
    clock = Clock()
    board = ProgressBoard([bundle("long", 10, 90.0), bundle("short", 10, 10.0)], clock=clock)
    board.update("long", counts(0))
    clock.now += 90
    board.update("long", counts(10))
    snapshot = board.snapshot()
    assert snapshot.fraction == pytest.approx(0.9)
    assert snapshot.seconds_left == pytest.approx(10)


def test_a_retried_bundle_starts_over_without_being_counted_twice() -> None:
    board = ProgressBoard([bundle("a", 10, 1.0)])
    board.update("a", counts(7))
    board.update("a", counts(4))
    assert board.snapshot().requests == 4
    board.update("a", counts(10))
    assert board.snapshot().fraction == 1.0


def test_a_plan_without_bundles_is_done() -> None:
    snapshot = ProgressBoard([]).snapshot()
    assert (snapshot.fraction, snapshot.requests_total) == (1.0, 0)


def test_a_bundle_that_is_not_in_the_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="'b'"):
        ProgressBoard([bundle("a", 1, 1.0)]).update("b", counts(1))


def test_many_threads_may_report_at_once() -> None:
    bundles = [bundle(f"bundle {index}", 200, 1.0) for index in range(8)]
    board = ProgressBoard(bundles)

    def report(name: str) -> None:
        for done in range(201):
            board.update(name, counts(done))
            board.snapshot()

    threads = [threading.Thread(target=report, args=(one.name,)) for one in bundles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert board.snapshot().requests == 1600
