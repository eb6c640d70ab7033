"""The fleet's own rules, and the runner's above it, on links that do as they are told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchllm_operators.errors import EngineDiedError, TerminalError, TransientError
from batchllm_operators.execute.bundle_runner import BundleRunner
from batchllm_operators.execute.dispatch import open_engines
from batchllm_operators.execute.driver import Deadlines, no_status
from batchllm_operators.execute.engine_ahead import engine_ahead
from batchllm_operators.execute.engine_work import EngineWork
from batchllm_operators.execute.fleet import EngineFleet
from batchllm_operators.execute.messages import Failed, Load
from batchllm_operators.records import AttentionForecast, BundleInfo, BundleResult, EngineSetting
from batchllm_operators.specs.execution import ExecutionSpec, ModelSpec
from batchllm_operators.specs.sampling import SamplingParameters
from tests.execute.told_links import CALIBRATION, KILLED, ToldBackend, ToldLink

LOAD = Load(model=ModelSpec(id="m"), block_size=64, gpus=2, task="generate")


def does_not_load(message: str, *, transient: bool) -> Failed:
    return Failed(message=message, transient=transient, engine_lost=True)


class Pool(EngineFleet):
    """A fleet on told links, with a runner."""

    def __init__(self, work: Any, links: list[ToldLink], engines: int = 1) -> None:
        super().__init__(ToldBackend(links, engines), Deadlines(30, 30, 1))
        self.load = LOAD
        told = work.engine_work(LOAD, part_rows=7, part_seconds=3.5)
        self.runner = BundleRunner(
            self, told.model_copy(update={"sampling": SamplingParameters(temperature=0.5)}), lambda *_: None
        )

    def run_bundle(self, bundle: BundleInfo) -> BundleResult:
        return self.runner.run(bundle)


@pytest.fixture
def make_pool(work: Any) -> Callable[..., Pool]:
    return lambda links, engines=1: Pool(work, links, engines)


def attention_forecast(*, pays: bool) -> AttentionForecast:
    saving = 0.2 if pays else 0.002
    return AttentionForecast(
        pays=pays, attention_saving=0.5, engine_saving=saving, needed_saving=0.01, rates="assumed, not measured"
    )


@pytest.mark.parametrize(
    ("asked", "forecast", "loaded"),
    [
        ("auto", attention_forecast(pays=False), "stock"),
        ("auto", attention_forecast(pays=True), "auto"),
        ("auto", None, "auto"),
        ("shared", attention_forecast(pays=False), "shared"),
        ("stock", attention_forecast(pays=False), "stock"),
    ],
)
def test_engines_get_vllms_own_attention_where_the_plan_was_to_choose_and_expects_no_gain(
    work: Any, asked: Any, forecast: AttentionForecast | None, loaded: str
) -> None:
    told: EngineWork = work.engine_work(
        Load(model=ModelSpec(id="m", attention=asked), block_size=16, gpus=1, task="generate")
    )
    load = told.with_attention(forecast).load
    assert load.model.attention == loaded
    changed = asked == "auto" and loaded == "stock"
    assert load.attention_reason == (
        "model.attention: auto; prefix-shared attention is expected to save 0.2% of the engines' time, 1.0% needed "
        "(rates of its kernels: assumed, not measured)"
        if changed
        else None
    )


def test_an_engine_gets_what_the_job_says(make_pool: Callable[..., Pool], work: Any) -> None:
    link = ToldLink()
    bundle = work.write_bundle()
    with make_pool([link]) as pool:
        pool.run_bundle(bundle)
    assert link.loads == [Load(model=ModelSpec(id="m"), block_size=64, gpus=2, task="generate")]
    (run,) = link.runs
    assert (run.bundle, run.work_uri) == (bundle.name, work.store.uri)
    assert (run.part_rows, run.part_seconds) == (7, 3.5)
    assert run.sampling == SamplingParameters(temperature=0.5)
    assert link.closed


def test_no_engine_is_started_before_it_is_needed_and_a_warm_one_is_taken_first(
    make_pool: Callable[..., Pool], work: Any
) -> None:
    first, second = ToldLink(), ToldLink()
    with make_pool([first, second], engines=2) as pool:
        for _ in range(3):
            pool.run_bundle(work.write_bundle())
    assert (len(first.runs), len(first.loads)) == (3, 1)
    assert second.loads == []


def test_two_threads_get_two_engines_and_a_third_waits_for_one(make_pool: Callable[..., Pool], work: Any) -> None:
    links = [ToldLink(), ToldLink()]
    for link in links:
        link.may_go_on.clear()
    bundle = work.write_bundle()
    with make_pool(links, engines=2) as pool:
        threads = [threading.Thread(target=pool.run_bundle, args=(bundle,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert all(link.entered.wait(30) for link in links)
        assert sum(len(link.runs) for link in links) == 2
        for link in links:
            link.may_go_on.set()
        for thread in threads:
            thread.join(30)
    assert sum(len(link.runs) for link in links) == 3


def start(pool: Pool, *bundles: BundleInfo) -> list[threading.Thread]:
    """Run bundles, each in its thread."""
    threads = [threading.Thread(target=pool.run_bundle, args=(bundle,)) for bundle in bundles]
    for thread in threads:
        thread.start()
    return threads


def test_an_engine_takes_its_next_bundle_once_it_has_read_the_one_before(
    make_pool: Callable[..., Pool], work: Any
) -> None:
    link = ToldLink()
    link.reads_all = True
    link.may_go_on.clear()
    with make_pool([link]) as pool:
        threads = start(pool, *(work.write_bundle(f"bundle-{number}") for number in range(3)))
        assert link.both_entered.wait(30)
        link.may_go_on.set()
        for thread in threads:
            thread.join(30)
    assert len(link.runs) == 3
    assert len(link.loads) == 1


def test_bundles_go_to_idle_engines_before_they_share_one(make_pool: Callable[..., Pool], work: Any) -> None:
    links = [ToldLink(), ToldLink()]
    for link in links:
        link.reads_all = True
        link.may_go_on.clear()
    with make_pool(links, engines=2) as pool:
        threads = start(pool, work.write_bundle("one"))
        assert links[0].entered.wait(30)
        threads += start(pool, work.write_bundle("two"))
        assert links[1].entered.wait(30)
        for link in links:
            link.may_go_on.set()
        for thread in threads:
            thread.join(30)
    assert [len(link.runs) for link in links] == [1, 1]


def test_the_search_for_a_guilty_request_has_its_engine_for_itself(make_pool: Callable[..., Pool], work: Any) -> None:
    first, second, unloadable, shared = links = [ToldLink() for _ in range(4)]
    for link in links:
        link.writes = False  # parts that are not there cannot be read
    first.faults.append(KILLED)
    second.faults.append(KILLED)
    unloadable.load_fault = does_not_load("killed", transient=True)
    shared.reads_all = True
    shared.may_go_on.clear()
    innocent, suspect = work.write_bundle("innocent"), work.write_bundle("suspect", first=100)
    with make_pool(links) as pool:
        with pytest.raises(EngineDiedError, match="died"):
            pool.run_bundle(suspect)
        with pytest.raises(TransientError, match="killed"):
            pool.run_bundle(suspect)
        threads = start(pool, innocent)
        assert shared.entered.wait(30)
        threads += start(pool, suspect)
        assert not shared.both_entered.wait(0.3)
        shared.may_go_on.set()
        for thread in threads:
            thread.join(30)
    assert [run.rows for run in shared.runs] == [None, (0, 6), (6, 12)]
    assert [run.bundle for run in shared.runs] == [innocent.name, suspect.name, suspect.name]


def test_another_attempt_at_a_bundle_knows_the_parts_of_the_first_and_other_bundles_do_not(
    make_pool: Callable[..., Pool], work: Any
) -> None:
    dying, fresh = ToldLink(), ToldLink()
    dying.faults.append(Failed(message="died", transient=True, engine_lost=True, stopped=True))
    bundle, other = work.write_bundle("one"), work.write_bundle("two")
    with make_pool([dying, fresh]) as pool:
        with pytest.raises(TransientError, match="died"):
            pool.run_bundle(bundle)
        pool.run_bundle(other)
        pool.run_bundle(bundle)
    assert dying.closed
    assert [run.known_parts for run in fresh.runs] == [(), ("results/part-1.parquet",)]


def test_a_model_that_cannot_be_loaded_is_not_loaded_for_every_bundle(
    make_pool: Callable[..., Pool], work: Any
) -> None:
    link = ToldLink()
    link.load_fault = does_not_load("out of memory", transient=False)
    with make_pool([link, ToldLink()]) as pool:
        for _ in range(3):
            with pytest.raises(TerminalError, match="out of memory"):
                pool.run_bundle(work.write_bundle())
    assert len(link.loads) == 1
    assert link.closed


def test_a_load_that_failed_for_now_is_tried_again(make_pool: Callable[..., Pool], work: Any) -> None:
    link = ToldLink()
    link.load_fault = does_not_load("killed", transient=True)
    with make_pool([link, ToldLink()]) as pool:
        with pytest.raises(TransientError, match="killed"):
            pool.run_bundle(work.write_bundle())
        assert pool.run_bundle(work.write_bundle()).requests == 1


def test_one_engine_measures_its_rates_and_is_warm_for_the_first_bundle(
    make_pool: Callable[..., Pool], work: Any
) -> None:
    first, second = ToldLink(), ToldLink()
    with make_pool([first, second], engines=2) as pool:
        measured = pool.load_one(LOAD.model_copy(update={"calibrate": True}))
        assert measured is not None
        assert measured.calibration == CALIBRATION
        assert pool.run_bundle(work.write_bundle("one")).load_seconds > 0
        assert pool.run_bundle(work.write_bundle("two")).load_seconds == 0
        assert pool.load_one(LOAD) is None
    assert [load.calibrate for load in first.loads] == [True]
    assert len(first.runs) == 2
    assert second.loads == []


def test_a_slow_choice_is_warned_of_once_however_many_engines_are_loaded(
    make_pool: Callable[..., Pool], work: Any, caplog: pytest.LogCaptureFixture
) -> None:
    links = [ToldLink(), ToldLink()]
    for link in links:
        link.settings = (EngineSetting(name="dtype", value="bfloat16", reason="the job", warning="slow here"),)
    with make_pool(links, engines=2) as pool, pool.lease(LOAD), pool.lease(LOAD):
        pass
    assert [len(link.loads) for link in links] == [1, 1]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == ["slow here"]


def test_an_engine_that_nobody_asked_measures_nothing(make_pool: Callable[..., Pool], work: Any) -> None:
    link = ToldLink()
    with make_pool([link]) as pool:
        pool.run_bundle(work.write_bundle())
    assert [load.calibrate for load in link.loads] == [False]


def test_closing_ends_the_working_thread_and_the_waiting_one(make_pool: Callable[..., Pool], work: Any) -> None:
    link = ToldLink()
    link.may_go_on.clear()
    bundle = work.write_bundle()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            pool.run_bundle(bundle)
        except TerminalError as error:
            errors.append(error)

    pool = make_pool([link])
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert link.entered.wait(30)
    pool.close()
    for thread in threads:
        thread.join(30)
    assert len(errors) == 2
    pool.close()
    with pytest.raises(TerminalError, match="closed"):
        pool.run_bundle(bundle)


def test_a_model_that_loads_ahead_is_waited_for_by_the_bundle_that_needs_it_and_by_no_other_engine(
    make_pool: Callable[..., Pool], work: Any
) -> None:
    first, second = ToldLink(), ToldLink()
    first.may_load.clear()
    with make_pool([first, second], engines=2) as pool:
        pool.start()
        assert (first.started, first.loads) == (True, [])
        pool.preload(LOAD)
        threads = start(pool, work.write_bundle("one"))
        assert first.asked_to_load.wait(30)
        assert not first.entered.wait(0.1)
        first.may_load.set()
        for thread in threads:
            thread.join(30)
    assert [load.calibrate for load in first.loads] == [False]
    assert (len(first.runs), second.loads) == (1, [])


def test_a_model_that_does_not_load_ahead_is_told_to_the_first_bundle(
    make_pool: Callable[..., Pool], work: Any
) -> None:
    first, second = ToldLink(), ToldLink()
    first.load_fault = does_not_load("out of memory", transient=False)
    with make_pool([first, second]) as pool:
        pool.preload(LOAD)
        with pytest.raises(TerminalError, match="out of memory"):
            pool.run_bundle(work.write_bundle())
    assert (len(first.loads), second.loads) == (1, [])


def test_an_engine_that_dies_while_it_loads_ahead_is_replaced_for_the_first_bundle(
    make_pool: Callable[..., Pool], work: Any
) -> None:
    first, second = ToldLink(), ToldLink()
    first.load_fault = does_not_load("killed", transient=True)
    with make_pool([first, second]) as pool:
        pool.preload(LOAD)
        assert first.asked_to_load.wait(30)
        bundle = work.write_bundle()
        try:
            pool.run_bundle(bundle)
        except TransientError:
            pool.run_bundle(bundle)
    assert len(second.runs) == 1


def test_engines_that_are_released_have_ended_when_the_pool_is_closed(
    make_pool: Callable[..., Pool], work: Any
) -> None:
    link = ToldLink()
    with make_pool([link]) as pool:
        pool.run_bundle(work.write_bundle())
        pool.release()
    assert link.closed


def run_on_told_engines(work: Any, python: str, *bundles: str) -> list[BundleResult]:
    """Bundles on engine processes, in one run."""
    told = work.engine_work(engine_python=python)
    with open_engines(told.execution, work.store, on_status=no_status) as fleet:
        fleet.start()
        runner = BundleRunner(fleet, told, lambda *_: None)
        return [runner.run(work.write_bundle(name)) for name in bundles]


def test_the_log_of_an_engine_is_kept_where_the_run_fails_and_only_its_end(
    told_engine: Callable[..., str], work: Any, caplog: pytest.LogCaptureFixture
) -> None:
    python = told_engine(load_fault="no luck", prints="begin\n" + "x" * 1_100_000 + "\nend")
    with pytest.raises(TerminalError, match=r"no luck(.|\n)*last lines of its log"):
        run_on_told_engines(work, python, "one")
    assert work.store.uri_of("logs/engine-0.log") in caplog.text
    kept = work.store.read_bytes("logs/engine-0.log")
    assert len(kept) <= 1024 * 1024
    assert kept.startswith(b"end\n")
    assert b"RuntimeError: no luck" in kept


def test_no_log_is_kept_where_the_run_succeeds(
    told_engine: Callable[..., str], work: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_on_told_engines(work, told_engine(), "one")[0].requests == 12
    assert "log is kept" not in caplog.text
    assert work.store.names("logs") == []


def test_an_engine_started_ahead_is_taken_by_the_first_run_of_its_execution_part_and_ends_with_it(
    told_engine: Callable[..., str], work: Any, tmp_path: Path, group_is_gone: Callable[[int], bool]
) -> None:
    submitted = tmp_path / "submitted"
    python = told_engine(submitted=str(submitted))

    def computed_by(bundle: str) -> int:
        run_on_told_engines(work, python, bundle)
        return int(submitted.read_text().split()[-2])

    with engine_ahead(ExecutionSpec(engine_python=python)):
        with engine_ahead(ExecutionSpec(engine_python=python, retries=7)):
            other = computed_by("other")
        ahead = computed_by("one")
        next_one = computed_by("two")
    assert len({other, ahead, next_one}) == 3
    assert all(group_is_gone(process) for process in (other, ahead, next_one))


def test_the_log_of_an_engine_started_ahead_is_kept_too(told_engine: Callable[..., str], work: Any) -> None:
    python = told_engine(load_fault="no luck", prints="before")
    with engine_ahead(ExecutionSpec(engine_python=python)), pytest.raises(TerminalError, match="no luck"):
        run_on_told_engines(work, python, "one")
    assert b"no luck" in work.store.read_bytes("logs/engine-0.log")


def test_an_engine_that_cannot_be_started_ahead_is_told_where_there_is_something_to_load(work: Any) -> None:
    with engine_ahead(ExecutionSpec(engine_python="/no/such/python")):
        assert run_on_told_engines(work, "/no/such/python") == []
        with pytest.raises(TerminalError, match=r"execution\.engine_python: cannot start"):
            run_on_told_engines(work, "/no/such/python", "one")
