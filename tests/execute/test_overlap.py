"""Two bundles in one engine: no gap between them, and to each what is its own, also when things go wrong."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from batchllm_operators.errors import TerminalError, TransientError
from batchllm_operators.execute.handle import BundleCallbacks, LocalEngineHandle
from batchllm_operators.execute.isolation import EngineDiedError
from batchllm_operators.execute.messages import BundleCounts, BundleDone, Load, Run
from batchllm_operators.execute.pool import EnginePool
from batchllm_operators.records import BundleInfo
from batchllm_operators.specs.execution import ExecutionSpec, ModelSpec
from batchllm_operators.specs.sampling import SamplingParameters

LOAD = Load(model=ModelSpec(id="m"), block_size=32, gpus=1)


def nothing(*_: object) -> None:
    return None


class Watched:
    """Runs bundles of a handle in threads and sees what is told of each."""

    def __init__(self, handle: LocalEngineHandle) -> None:
        self.handle = handle
        self.threads = ThreadPoolExecutor(4)
        self.parts: dict[str, list[str]] = {}
        self.answered: dict[str, int] = {}
        self.all_read: dict[str, threading.Event] = {}
        self.changed = threading.Condition()

    def start(self, command: Run) -> Future[BundleDone]:
        name = command.bundle
        self.all_read[name] = threading.Event()
        self.parts[name] = []

        def progress(bundle: str, counts: BundleCounts) -> None:
            with self.changed:
                self.answered[bundle] = counts.requests
                self.changed.notify_all()

        callbacks = BundleCallbacks(progress, self.parts[name].append, self.all_read[name].set)
        return self.threads.submit(self.handle.run_bundle, command, callbacks)

    def wait_for(self, bundle: str, answers: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.answered.get(bundle, 0) >= answers, 60)


@pytest.fixture
def watch(
    make_handle: Callable[..., LocalEngineHandle], told_engine: Callable[..., str]
) -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def make(stall_timeout_s: float = 60.0, **settings: object) -> Watched:
        handle = make_handle(python=told_engine(**settings), stall_timeout_s=stall_timeout_s)
        handle.load(LOAD)
        made.append(Watched(handle))
        return made[-1]

    yield make
    for one in made:
        one.handle.close()
        one.threads.shutdown()


@pytest.fixture
def two_in_flight(
    watch: Callable[..., Watched], work: Any
) -> tuple[Watched, list[BundleInfo], list[Future[BundleDone]]]:
    """An engine that holds requests of two bundles: the first's last ones run long."""
    watched = watch(capacity=8, step_seconds=0.01)
    bundles = [
        work.write_bundle("first", requests=10, max_tokens=2, long_rows={8, 9}),
        work.write_bundle("second", requests=2000, max_tokens=2, first=100),
    ]
    first = watched.start(work.run_command(bundles[0], part_rows=1))
    assert watched.all_read[bundles[0].name].wait(60)
    second = watched.start(work.run_command(bundles[1], part_rows=1))
    watched.wait_for(bundles[1].name, 4)
    return watched, bundles, [first, second]


def test_the_next_bundle_enters_before_the_last_one_ends(
    watch: Callable[..., Watched], work: Any, tmp_path: Path
) -> None:
    log = tmp_path / "submitted"
    watched = watch(capacity=8, step_seconds=0.01, submitted=str(log))
    slow = work.write_bundle("slow", requests=10, max_tokens=2, long_rows={9}, long_tokens=150)
    quick = work.write_bundle("quick", requests=30, max_tokens=2, first=100)
    last = watched.start(work.run_command(slow))
    assert watched.all_read[slow.name].wait(60)
    done = watched.start(work.run_command(quick)).result(60)
    assert not last.done()
    first = last.result(60)
    assert list(work.answers(done.parts)) == list(range(100, 130))
    assert list(work.answers(first.parts)) == list(range(10))
    assert (first.counts.requests, done.counts.requests) == (10, 30)
    assert [int(line.split()[1]) - 2000 for line in log.read_text().splitlines()] == [*range(10), *range(100, 130)]
    # The busy time of the engine is divided, not counted twice.
    assert done.seconds > 0
    assert first.seconds > 0


def test_a_death_fails_both_bundles_and_each_keeps_its_finished_rows(
    two_in_flight: tuple[Watched, list[BundleInfo], list[Future[BundleDone]]], work: Any
) -> None:
    watched, bundles, futures = two_in_flight
    os.kill(watched.handle.pid or 0, signal.SIGKILL)
    for bundle, future in zip(bundles, futures, strict=True):
        with pytest.raises(EngineDiedError, match="killed by signal 9") as caught:
            future.result(60)
        assert caught.value.bundle == bundle.name
    assert not watched.handle.usable
    first, second = (work.answers(tuple(watched.parts[bundle.name])) for bundle in bundles)
    assert first
    assert second
    assert max(first) < 10 <= min(second)


def test_closing_with_two_bundles_in_flight_ends_both_calls_and_keeps_finished_rows(
    two_in_flight: tuple[Watched, list[BundleInfo], list[Future[BundleDone]]],
    work: Any,
    group_is_gone: Callable[[int], bool],
) -> None:
    watched, _, futures = two_in_flight
    watched.handle.close()
    for future in futures:
        with pytest.raises(TerminalError, match="closed"):
            future.result(60)
    assert group_is_gone(watched.handle.pid or 0)
    kept = work.answers(tuple(work.store.names("results")))
    assert sum(number >= 100 for number in kept) >= 4
    assert set(range(8)) <= set(kept)


def test_sigterm_keeps_the_finished_rows_of_both(
    two_in_flight: tuple[Watched, list[BundleInfo], list[Future[BundleDone]]], work: Any
) -> None:
    watched, bundles, futures = two_in_flight
    answered = dict(watched.answered)
    os.kill(watched.handle.pid or 0, signal.SIGTERM)
    for bundle, future in zip(bundles, futures, strict=True):
        with pytest.raises(TransientError, match="told to stop") as caught:
            future.result(60)
        assert not isinstance(caught.value, EngineDiedError)
        assert caught.value.bundle == bundle.name
    kept = work.answers(tuple(work.store.names("results")))
    assert sum(number < 100 for number in kept) >= answered[bundles[0].name] == 8
    assert sum(number >= 100 for number in kept) >= answered[bundles[1].name] >= 4


def test_a_bundle_that_cannot_be_read_leaves_the_other_and_the_engine_alone(
    watch: Callable[..., Watched], work: Any
) -> None:
    watched = watch(capacity=4, step_seconds=0.01)
    good = work.write_bundle("good", requests=1000, max_tokens=2)
    missing = work.write_bundle("missing", requests=4, first=100)
    work.store.delete([missing.name])
    going = watched.start(work.run_command(good))
    watched.wait_for(good.name, 4)
    with pytest.raises(TerminalError, match="no such object") as caught:
        watched.start(work.run_command(missing)).result(60)
    assert caught.value.bundle == missing.name
    assert going.result(60).counts.requests == 1000
    assert watched.handle.usable


def test_an_engine_that_steps_without_computing_is_given_up(watch: Callable[..., Watched], work: Any) -> None:
    watched = watch(stall_timeout_s=1.0, step_seconds=0.01, stuck=2003)
    bundle = work.write_bundle(requests=12)
    with pytest.raises(EngineDiedError, match="no sign of life for 1 s"):
        watched.start(work.run_command(bundle, part_rows=1)).result(60)
    assert not watched.handle.usable


def test_a_long_computation_without_an_answer_is_a_sign_of_life(watch: Callable[..., Watched], work: Any) -> None:
    watched = watch(stall_timeout_s=1.0, step_seconds=0.01)
    bundle = work.write_bundle(requests=1, max_tokens=300)
    assert watched.start(work.run_command(bundle)).result(60).counts.completion_tokens == 300


def test_an_idle_engine_is_not_given_up(watch: Callable[..., Watched], work: Any) -> None:
    watched = watch(stall_timeout_s=0.5)
    threading.Event().wait(1.2)
    assert watched.start(work.run_command(work.write_bundle())).result(60).counts.requests == 12


def test_the_pool_gives_an_engine_its_next_bundle_while_it_finishes_the_last(
    make_handle: Callable[..., LocalEngineHandle], told_engine: Callable[..., str], work: Any, tmp_path: Path
) -> None:
    log = tmp_path / "submitted"
    python = told_engine(capacity=8, step_seconds=0.005, submitted=str(log))
    bundles = [
        work.write_bundle(
            f"bundle-{number}", requests=12, max_tokens=2, first=100 * number, long_rows={11}, long_tokens=60
        )
        for number in range(4)
    ]
    pool = EnginePool(
        model=ModelSpec(id="m"),
        execution=ExecutionSpec(),
        block_size=32,
        sampling=SamplingParameters(),
        work=work.store,
        make_handle=lambda _: make_handle(python=python),
    )
    with pool, ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda bundle: pool.run_bundle(bundle, nothing), bundles))
    for number, result in enumerate(results):
        assert list(work.answers(result.parts)) == list(range(100 * number, 100 * number + 12))
    assert len({line.split()[0] for line in log.read_text().splitlines()}) == 1
    assert sum(result.load_seconds > 0 for result in results) == 1
