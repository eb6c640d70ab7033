"""What every backend keeps, on engines that do as they are told: load, stream, overlap, death, stall, and the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from batchllm_operators.errors import EngineDiedError, TerminalError, TransientError
from batchllm_operators.execute.backends.base import EngineBackend
from batchllm_operators.execute.bundle_runner import BundleRunner
from batchllm_operators.execute.driver import Deadlines
from batchllm_operators.execute.fleet import EngineFleet
from batchllm_operators.execute.messages import (
    AllRead,
    BundleDone,
    BundleEvent,
    EnginePhase,
    Load,
    Loading,
    PartWritten,
    Progress,
    Run,
)
from batchllm_operators.records import BundleInfo
from batchllm_operators.specs.execution import ModelSpec
from tests.execute.engines import StartedEngine, inline_backend, local_backend, started_engine
from tests.execute.pipe_backend import PipeBackend
from tests.execute.told_engine import told_maker

LOAD = Load(model=ModelSpec(id="m"), block_size=32, gpus=1, task="generate")

MakeBackend = Callable[..., EngineBackend]


@pytest.fixture(params=["local", "inline", "from outside"])
def make_backend(request: pytest.FixtureRequest, told_engine: Callable[..., str]) -> MakeBackend:
    """Makes a backend whose scripted engines do as the settings say; processes die by a real signal."""

    def make(engines: int = 1, **script: object) -> EngineBackend:
        if request.param == "local":
            return local_backend(told_engine(**script), engines)
        if request.param == "inline":
            return inline_backend(engines, **script)
        return PipeBackend(engines, partial(told_maker, script))

    return make


@pytest.fixture
def start(make_backend: MakeBackend) -> Iterator[Callable[..., StartedEngine]]:
    """Starts an engine, which is not loaded; deadlines in seconds and settings of its script by name."""
    with ExitStack() as ending:

        def start(
            on_status: Any = lambda *_: None, stall_s: float = 60.0, load_s: float = 60.0, **script: object
        ) -> StartedEngine:
            backend = make_backend(**script)
            return ending.enter_context(started_engine(backend, on_status=on_status, stall_s=stall_s, load_s=load_s))

        yield start


class Watched:
    """Runs bundles of an engine in threads and sees what is told of each."""

    def __init__(self, engine: StartedEngine) -> None:
        self.engine = engine
        self.threads = ThreadPoolExecutor(4)
        self.parts: dict[str, list[str]] = {}
        self.answered: dict[str, int] = {}
        self.all_read: dict[str, threading.Event] = {}
        self.changed = threading.Condition()

    def start(self, command: Run) -> Future[BundleDone]:
        self.all_read[command.bundle] = threading.Event()
        self.parts[command.bundle] = []
        return self.threads.submit(self.engine.run, command, self.see)

    def see(self, event: BundleEvent) -> None:
        if isinstance(event, PartWritten):
            self.parts[event.bundle].append(event.name)
        elif isinstance(event, AllRead):
            self.all_read[event.bundle].set()
        elif isinstance(event, Progress):
            with self.changed:
                self.answered[event.bundle] = event.counts.requests
                self.changed.notify_all()

    def wait_for(self, bundle: str, answers: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.answered.get(bundle, 0) >= answers, 60)


@pytest.fixture
def watch(start: Callable[..., StartedEngine]) -> Iterator[Callable[..., Watched]]:
    """Starts and loads an engine whose bundles are watched."""
    made: list[Watched] = []

    def make(**settings: object) -> Watched:
        engine = start(**settings)
        engine.driver.load(LOAD)
        made.append(Watched(engine))
        return made[-1]

    yield make
    for one in made:
        one.engine.driver.close()
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
    watched.engine.link.kill()
    for bundle, future in zip(bundles, futures, strict=True):
        with pytest.raises(EngineDiedError, match="killed by signal 9") as caught:
            future.result(60)
        assert caught.value.bundle == bundle.name
    assert not watched.engine.driver.usable
    first, second = (work.answers(tuple(watched.parts[bundle.name])) for bundle in bundles)
    assert first
    assert second
    assert max(first) < 10 <= min(second)


def test_closing_with_two_bundles_in_flight_ends_both_calls_and_keeps_finished_rows(
    two_in_flight: tuple[Watched, list[BundleInfo], list[Future[BundleDone]]], work: Any
) -> None:
    watched, _, futures = two_in_flight
    watched.engine.driver.close()
    for future in futures:
        with pytest.raises(TerminalError, match="closed"):
            future.result(60)
    assert watched.engine.link.death() is not None
    kept = work.answers(tuple(work.store.names("results")))
    assert sum(number >= 100 for number in kept) >= 4
    assert set(range(8)) <= set(kept)


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
    assert watched.engine.driver.usable


def test_an_engine_that_steps_without_computing_is_given_up(watch: Callable[..., Watched], work: Any) -> None:
    watched = watch(stall_s=1.0, step_seconds=0.01, stuck=2003)
    bundle = work.write_bundle(requests=12)
    with pytest.raises(EngineDiedError, match="no sign of life for 1 s"):
        watched.start(work.run_command(bundle, part_rows=1)).result(60)
    assert not watched.engine.driver.usable


def test_a_long_computation_without_an_answer_is_a_sign_of_life(watch: Callable[..., Watched], work: Any) -> None:
    watched = watch(stall_s=1.0, step_seconds=0.01)
    bundle = work.write_bundle(requests=1, max_tokens=300)
    assert watched.start(work.run_command(bundle)).result(60).counts.completion_tokens == 300


def test_an_idle_engine_is_not_given_up(watch: Callable[..., Watched], work: Any) -> None:
    watched = watch(stall_s=0.5)
    threading.Event().wait(1.2)
    assert watched.start(work.run_command(work.write_bundle())).result(60).counts.requests == 12


def test_a_fleet_gives_an_engine_its_next_bundle_while_it_finishes_the_last(
    make_backend: MakeBackend, work: Any, tmp_path: Path
) -> None:
    log = tmp_path / "submitted"
    bundles = [
        work.write_bundle(
            f"bundle-{number}", requests=12, max_tokens=2, first=100 * number, long_rows={11}, long_tokens=60
        )
        for number in range(4)
    ]
    backend = make_backend(capacity=8, step_seconds=0.005, submitted=str(log))
    with EngineFleet(backend, Deadlines(60, 60)) as fleet, ThreadPoolExecutor(4) as threads:
        runner = BundleRunner(fleet, work.engine_work(), lambda *_: None)
        results = list(threads.map(runner.run, bundles))
    for number, result in enumerate(results):
        assert list(work.answers(result.parts)) == list(range(100 * number, 100 * number + 12))
    assert len({line.split()[0] for line in log.read_text().splitlines()}) == 1
    assert sum(result.load_seconds > 0 for result in results) == 1
    assert sum(len(result.loads) for result in results) == 1


def test_a_load_tells_its_phases_and_its_settings(start: Callable[..., StartedEngine]) -> None:
    told: list[tuple[str, Loading | None]] = []
    engine = start(on_status=lambda *status: told.append(status))
    assert told == [], "nobody waits for it yet"
    loaded = engine.driver.load(LOAD)
    assert [(one.name, one.value, one.reason) for one in loaded.settings] == [("attention", "stock", "the job")]
    assert {name for name, _ in told} == {"engine 0"}
    phases = [phase for phase, _ in groupby(loading and loading.phase for _, loading in told)]
    assert phases == [EnginePhase.ENVIRONMENT, EnginePhase.WEIGHTS, None]
    assert engine.driver.usable


def test_events_of_a_bundle_come_in_their_order_and_the_last_is_that_it_is_done(
    start: Callable[..., StartedEngine], work: Any
) -> None:
    engine = start(step_seconds=0.01)
    engine.driver.load(LOAD)
    bundle = work.write_bundle(requests=40, max_tokens=4)
    events: list[BundleEvent] = []
    done = engine.run(work.run_command(bundle, part_rows=8), events.append)
    assert events[-1] is done
    assert {event.bundle for event in events} == {bundle.name}
    assert [event.name for event in events if isinstance(event, PartWritten)] == list(done.parts)
    assert sum(isinstance(event, AllRead) for event in events) == 1
    counts = [event.counts.requests for event in events if isinstance(event, Progress)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 40)
    assert list(work.answers(done.parts)) == list(range(40))


def test_a_model_that_does_not_load_says_why_and_leaves_no_engine(start: Callable[..., StartedEngine]) -> None:
    engine = start(load_fault="it failed", prints="what it printed before")
    with pytest.raises(TerminalError, match="RuntimeError: it failed"):
        engine.driver.load(LOAD)
    assert not engine.driver.usable
    assert engine.link.death(30) is not None


def test_an_engine_that_is_killed_while_it_loads_may_do_better_the_next_time(
    start: Callable[..., StartedEngine],
) -> None:
    engine = start(killed_while_loading=True)
    with pytest.raises(TransientError, match="engine 0 died while loading the model: killed by signal 9") as caught:
        engine.driver.load(LOAD)
    assert not isinstance(caught.value, EngineDiedError)
    death = engine.link.death()
    assert death is not None
    assert death.exit_code == -9


def test_a_model_that_takes_too_long_is_given_up(start: Callable[..., StartedEngine]) -> None:
    engine = start(load_s=0.3, load_seconds=5.0)
    with pytest.raises(TransientError, match=r"was not ready after 0\.3 s of loading the model"):
        engine.driver.load(LOAD)
    assert engine.link.death() is not None


def test_closing_while_a_model_loads_does_not_wait_for_it(start: Callable[..., StartedEngine]) -> None:
    loading = threading.Event()

    def see(_: str, status: Loading | None) -> None:
        if status is not None and status.phase == EnginePhase.WEIGHTS:
            loading.set()

    engine = start(on_status=see, load_seconds=60.0)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(engine.driver.load, LOAD)
        assert loading.wait(30)
        engine.driver.close()
        with pytest.raises(TerminalError, match="closed"):
            waiting.result(30)
    assert engine.link.death() is not None


def test_an_idle_engine_ends_when_it_is_told_to(start: Callable[..., StartedEngine], work: Any) -> None:
    engine = start()
    engine.driver.load(LOAD)
    engine.driver.close()
    death = engine.link.death()
    assert death is not None
    assert death.exit_code == 0
    assert not engine.driver.usable
    with pytest.raises(TerminalError, match="closed"):
        engine.run(work.run_command(work.write_bundle()))


def test_a_bundle_that_comes_after_a_death_is_not_to_blame_for_it(
    start: Callable[..., StartedEngine], work: Any
) -> None:
    engine = start(poison=2003)
    engine.driver.load(LOAD)
    with pytest.raises(EngineDiedError, match="engine 0 died while running: killed by signal 9"):
        engine.run(work.run_command(work.write_bundle("poisoned", requests=4)))
    with pytest.raises(TransientError, match="killed by signal 9") as caught:
        engine.run(work.run_command(work.write_bundle("next", first=100)))
    assert not isinstance(caught.value, EngineDiedError)


def test_an_engine_left_in_the_midst_of_a_bundle_is_not_used_again(
    start: Callable[..., StartedEngine], work: Any
) -> None:
    engine = start(step_seconds=0.01)
    engine.driver.load(LOAD)

    def fail(_event: BundleEvent) -> None:
        raise KeyError("in the loop over the events")

    with pytest.raises(KeyError, match="in the loop"):
        engine.run(work.run_command(work.write_bundle()), fail)
    assert not engine.driver.usable
    assert engine.link.death() is not None
