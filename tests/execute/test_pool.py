"""The pool's own rules, on handles that do as they are told; real engines are in the other modules."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchllm_operators.cost import CPU_DEFAULT, Calibration
from batchllm_operators.errors import BatchLLMError, TerminalError, TransientError
from batchllm_operators.execute.engine_ahead import engine_ahead
from batchllm_operators.execute.handle import BundleCallbacks
from batchllm_operators.execute.isolation import EngineDiedError
from batchllm_operators.execute.messages import BundleCounts, BundleDone, Load, Loaded, Run
from batchllm_operators.execute.pool import EnginePool
from batchllm_operators.records import AttentionForecast, BundleInfo, EngineSetting
from batchllm_operators.specs.execution import ExecutionSpec, ModelSpec
from batchllm_operators.specs.sampling import SamplingParameters, SamplingSpec

CALIBRATION = Calibration(rates=CPU_DEFAULT, device="d", measured_at="2026-01-31 12:00:00", seconds=1.0)


class ToldHandle:
    """Answers a bundle with what the test has put in `faults`, else with success; remembers its commands."""

    def __init__(self) -> None:
        self.usable = True
        self.started = False
        self.asked_to_load = threading.Event()
        self.may_load = threading.Event()
        self.may_load.set()
        self.loads: list[Load] = []
        self.runs: list[Run] = []
        self.load_fault: BatchLLMError | None = None
        self.faults: list[BatchLLMError] = []
        self.entered = threading.Event()
        self.both_entered = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.closed = False
        self.reads_all = False
        self.writes = True
        self.settings: tuple[EngineSetting, ...] = ()

    def start(self) -> None:
        self.started = True

    def load(self, command: Load) -> Loaded:
        self.loads.append(command)
        self.asked_to_load.set()
        assert self.may_load.wait(30)
        if self.load_fault is not None:
            self.usable = False
            raise self.load_fault
        calibration = CALIBRATION if command.calibrate else None
        return Loaded(seconds=2.5, calibration=calibration, settings=self.settings)

    def run_bundle(self, command: Run, callbacks: BundleCallbacks) -> BundleDone:
        self.runs.append(command)
        callbacks.on_progress(command.bundle, BundleCounts())
        part = f"results/part-{len(self.runs)}.parquet"
        if self.writes:
            callbacks.on_part(part)
        if self.reads_all:
            callbacks.on_all_read()
        if self.faults:
            self.usable = False
            raise self.faults.pop(0)
        if self.entered.is_set():
            self.both_entered.set()
        self.entered.set()
        assert self.may_go_on.wait(30)
        if self.closed:
            raise TerminalError("closed")
        return BundleDone(
            bundle=command.bundle, counts=BundleCounts(requests=1), parts=(*command.known_parts, part), seconds=1.0
        )

    def close(self) -> None:
        self.closed = True
        self.usable = False
        self.may_go_on.set()


def nothing(*_: object) -> None:
    return None


@pytest.fixture
def make_pool(work: Any) -> Callable[..., EnginePool]:
    def make(handles: list[ToldHandle], engines: int = 1) -> EnginePool:
        left = iter(handles)
        return EnginePool(
            model=ModelSpec(id="m"),
            execution=ExecutionSpec(engines=engines, gpus_per_engine=2, part_rows=7, part_seconds=3.5),
            block_size=64,
            sampling=SamplingSpec(temperature=0.5, override_column="o"),
            work=work.store,
            make_handle=lambda _: next(left),
        )

    return make


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
    handle = ToldHandle()
    pool = EnginePool(
        model=ModelSpec(id="m", attention=asked),
        execution=ExecutionSpec(),
        block_size=16,
        sampling=SamplingSpec(),
        work=work.store,
        make_handle=lambda _: handle,
    )
    with pool:
        pool.choose_attention(forecast)
        pool.run_bundle(work.write_bundle(), nothing)
    (load,) = handle.loads
    assert load.model.attention == loaded
    changed = asked == "auto" and loaded == "stock"
    assert load.attention_reason == (
        "model.attention: auto; prefix-shared attention is expected to save 0.2% of the engines' time, 1.0% needed "
        "(rates of its kernels: assumed, not measured)"
        if changed
        else None
    )


def test_an_engine_gets_what_the_job_says(make_pool: Callable[..., EnginePool], work: Any) -> None:
    handle = ToldHandle()
    bundle = work.write_bundle()
    with make_pool([handle]) as pool:
        pool.run_bundle(bundle, nothing)
    assert handle.loads == [Load(model=ModelSpec(id="m"), block_size=64, gpus=2)]
    (run,) = handle.runs
    assert (run.bundle, run.work_uri) == (bundle.name, work.store.uri)
    assert (run.part_rows, run.part_seconds) == (7, 3.5)
    assert run.sampling == SamplingParameters(temperature=0.5)
    assert handle.closed


def test_no_engine_is_started_before_it_is_needed_and_a_warm_one_is_taken_first(
    make_pool: Callable[..., EnginePool], work: Any
) -> None:
    first, second = ToldHandle(), ToldHandle()
    with make_pool([first, second], engines=2) as pool:
        for _ in range(3):
            pool.run_bundle(work.write_bundle(), nothing)
    assert (len(first.runs), len(first.loads)) == (3, 1)
    assert second.loads == []


def test_two_threads_get_two_engines_and_a_third_waits_for_one(make_pool: Callable[..., EnginePool], work: Any) -> None:
    handles = [ToldHandle(), ToldHandle()]
    for handle in handles:
        handle.may_go_on.clear()
    bundle = work.write_bundle()
    with make_pool(handles, engines=2) as pool:
        threads = [threading.Thread(target=pool.run_bundle, args=(bundle, nothing)) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert all(handle.entered.wait(30) for handle in handles)
        assert sum(len(handle.runs) for handle in handles) == 2
        for handle in handles:
            handle.may_go_on.set()
        for thread in threads:
            thread.join(30)
    assert sum(len(handle.runs) for handle in handles) == 3


def start(pool: EnginePool, *bundles: BundleInfo) -> list[threading.Thread]:
    """Run bundles, each in its thread."""
    threads = [threading.Thread(target=pool.run_bundle, args=(bundle, nothing)) for bundle in bundles]
    for thread in threads:
        thread.start()
    return threads


def test_an_engine_takes_its_next_bundle_once_it_has_read_the_one_before(
    make_pool: Callable[..., EnginePool], work: Any
) -> None:
    handle = ToldHandle()
    handle.reads_all = True
    handle.may_go_on.clear()
    with make_pool([handle]) as pool:
        threads = start(pool, *(work.write_bundle(f"bundle-{number}") for number in range(3)))
        assert handle.both_entered.wait(30)
        handle.may_go_on.set()
        for thread in threads:
            thread.join(30)
    assert len(handle.runs) == 3
    assert len(handle.loads) == 1


def test_bundles_go_to_idle_engines_before_they_share_one(make_pool: Callable[..., EnginePool], work: Any) -> None:
    handles = [ToldHandle(), ToldHandle()]
    for handle in handles:
        handle.reads_all = True
        handle.may_go_on.clear()
    with make_pool(handles, engines=2) as pool:
        threads = start(pool, work.write_bundle("one"))
        assert handles[0].entered.wait(30)
        threads += start(pool, work.write_bundle("two"))
        assert handles[1].entered.wait(30)
        for handle in handles:
            handle.may_go_on.set()
        for thread in threads:
            thread.join(30)
    assert [len(handle.runs) for handle in handles] == [1, 1]


def test_the_search_for_a_guilty_request_has_its_engine_for_itself(
    make_pool: Callable[..., EnginePool], work: Any
) -> None:
    first, second, unloadable, shared = handles = [ToldHandle() for _ in range(4)]
    for handle in handles:
        handle.writes = False  # parts that are not there cannot be read
    first.faults.append(EngineDiedError("died"))
    second.faults.append(EngineDiedError("died"))
    unloadable.load_fault = TransientError("killed")
    shared.reads_all = True
    shared.may_go_on.clear()
    innocent, suspect = work.write_bundle("innocent"), work.write_bundle("suspect", first=100)
    with make_pool(handles) as pool:
        with pytest.raises(EngineDiedError, match="died"):
            pool.run_bundle(suspect, nothing)
        with pytest.raises(TransientError, match="killed"):
            pool.run_bundle(suspect, nothing)
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
    make_pool: Callable[..., EnginePool], work: Any
) -> None:
    dying, fresh = ToldHandle(), ToldHandle()
    dying.faults.append(TransientError("died"))
    bundle, other = work.write_bundle("one"), work.write_bundle("two")
    with make_pool([dying, fresh]) as pool:
        with pytest.raises(TransientError, match="died"):
            pool.run_bundle(bundle, nothing)
        assert dying.usable is False
        pool.run_bundle(other, nothing)
        pool.run_bundle(bundle, nothing)
    assert dying.closed
    assert [run.known_parts for run in fresh.runs] == [(), ("results/part-1.parquet",)]


def test_a_model_that_cannot_be_loaded_is_not_loaded_for_every_bundle(
    make_pool: Callable[..., EnginePool], work: Any
) -> None:
    handle = ToldHandle()
    handle.load_fault = TerminalError("out of memory")
    with make_pool([handle, ToldHandle()]) as pool:
        for _ in range(3):
            with pytest.raises(TerminalError, match="out of memory"):
                pool.run_bundle(work.write_bundle(), nothing)
    assert len(handle.loads) == 1
    assert handle.closed


def test_a_load_that_failed_for_now_is_tried_again(make_pool: Callable[..., EnginePool], work: Any) -> None:
    handle = ToldHandle()
    handle.load_fault = TransientError("killed")
    with make_pool([handle, ToldHandle()]) as pool:
        with pytest.raises(TransientError, match="killed"):
            pool.run_bundle(work.write_bundle(), nothing)
        assert pool.run_bundle(work.write_bundle(), nothing).requests == 1


def test_one_engine_measures_its_rates_and_is_warm_for_the_first_bundle(
    make_pool: Callable[..., EnginePool], work: Any
) -> None:
    first, second = ToldHandle(), ToldHandle()
    with make_pool([first, second], engines=2) as pool:
        assert pool.calibrate() == CALIBRATION
        assert pool.run_bundle(work.write_bundle("one"), nothing).load_seconds > 0
        assert pool.run_bundle(work.write_bundle("two"), nothing).load_seconds == 0
        assert pool.calibrate() is None
    assert [load.calibrate for load in first.loads] == [True]
    assert len(first.runs) == 2
    assert second.loads == []


def test_a_slow_choice_is_warned_of_once_however_many_engines_are_loaded(
    make_pool: Callable[..., EnginePool], work: Any, caplog: pytest.LogCaptureFixture
) -> None:
    handles = [ToldHandle(), ToldHandle()]
    for handle in handles:
        handle.settings = (EngineSetting(name="dtype", value="bfloat16", reason="the job", warning="slow here"),)
    with make_pool(handles, engines=2) as pool, pool.lease(), pool.lease():
        pass
    assert [len(handle.loads) for handle in handles] == [1, 1]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == ["slow here"]


def test_an_engine_is_told_how_long_to_measure_and_what_to_assume_else(make_pool: Callable[..., EnginePool]) -> None:
    handle = ToldHandle()
    with make_pool([handle]) as pool:
        pool.calibrate(7.5, CPU_DEFAULT)
    assert [(load.calibration_seconds, load.default_rates) for load in handle.loads] == [(7.5, CPU_DEFAULT)]


def test_an_engine_that_nobody_asked_measures_nothing(make_pool: Callable[..., EnginePool], work: Any) -> None:
    handle = ToldHandle()
    with make_pool([handle]) as pool:
        pool.run_bundle(work.write_bundle(), nothing)
    assert [load.calibrate for load in handle.loads] == [False]


def test_closing_ends_the_working_thread_and_the_waiting_one(make_pool: Callable[..., EnginePool], work: Any) -> None:
    handle = ToldHandle()
    handle.may_go_on.clear()
    bundle = work.write_bundle()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            pool.run_bundle(bundle, nothing)
        except TerminalError as error:
            errors.append(error)

    pool = make_pool([handle])
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert handle.entered.wait(30)
    pool.close()
    for thread in threads:
        thread.join(30)
    assert len(errors) == 2
    pool.close()
    with pytest.raises(TerminalError, match="closed"):
        pool.run_bundle(bundle, nothing)


def test_a_model_that_loads_ahead_is_waited_for_by_the_bundle_that_needs_it_and_by_no_other_engine(
    make_pool: Callable[..., EnginePool], work: Any
) -> None:
    first, second = ToldHandle(), ToldHandle()
    first.may_load.clear()
    with make_pool([first, second], engines=2) as pool:
        pool.start()
        assert (first.started, first.loads) == (True, [])
        pool.preload()
        threads = start(pool, work.write_bundle("one"))
        assert first.asked_to_load.wait(30)
        assert not first.entered.wait(0.1)
        first.may_load.set()
        for thread in threads:
            thread.join(30)
        assert pool.load_seconds == 2.5
    assert [load.calibrate for load in first.loads] == [False]
    assert (len(first.runs), second.loads) == (1, [])


def test_a_model_that_does_not_load_ahead_is_told_to_the_first_bundle(
    make_pool: Callable[..., EnginePool], work: Any
) -> None:
    first, second = ToldHandle(), ToldHandle()
    first.load_fault = TerminalError("out of memory")
    with make_pool([first, second]) as pool:
        pool.preload()
        with pytest.raises(TerminalError, match="out of memory"):
            pool.run_bundle(work.write_bundle(), nothing)
    assert (len(first.loads), second.loads) == (1, [])


def test_an_engine_that_dies_while_it_loads_ahead_is_replaced_for_the_first_bundle(
    make_pool: Callable[..., EnginePool], work: Any
) -> None:
    first, second = ToldHandle(), ToldHandle()
    first.load_fault = TransientError("killed")
    with make_pool([first, second]) as pool:
        pool.preload()
        assert first.asked_to_load.wait(30)
        bundle = work.write_bundle()
        try:
            pool.run_bundle(bundle, nothing)
        except TransientError:
            pool.run_bundle(bundle, nothing)
    assert len(second.runs) == 1


def test_engines_that_are_released_have_ended_when_the_pool_is_closed(
    make_pool: Callable[..., EnginePool], work: Any
) -> None:
    handle = ToldHandle()
    with make_pool([handle]) as pool:
        pool.run_bundle(work.write_bundle(), nothing)
        pool.release()
    assert handle.closed


def pool_on_told_engines(work: Any, python: str) -> EnginePool:
    return EnginePool(
        model=ModelSpec(id="m"),
        execution=ExecutionSpec(engine_python=python),
        block_size=32,
        sampling=SamplingSpec(),
        work=work.store,
    )


def test_the_log_of_an_engine_is_kept_where_the_run_fails_and_only_its_end(
    told_engine: Callable[..., str], work: Any
) -> None:
    python = told_engine(load_fault="no luck", prints="begin\n" + "x" * 1_100_000 + "\nend")
    pool = pool_on_told_engines(work, python)
    with pytest.raises(TerminalError, match=r"no luck(.|\n)*last lines of its log"), pool:
        pool.run_bundle(work.write_bundle(), nothing)
    assert pool.kept_logs == [work.store.uri_of("logs/engine-0.log")]
    kept = work.store.read_bytes("logs/engine-0.log")
    assert len(kept) <= 1024 * 1024
    assert kept.startswith(b"end\n")
    assert b"RuntimeError: no luck" in kept


def test_no_log_is_kept_where_the_run_succeeds(told_engine: Callable[..., str], work: Any) -> None:
    with pool_on_told_engines(work, told_engine()) as pool:
        assert pool.run_bundle(work.write_bundle(), nothing).requests == 12
    assert pool.kept_logs == []
    assert work.store.names("logs") == []


def test_an_engine_started_ahead_is_taken_by_the_first_pool_of_its_execution_part_and_ends_with_the_block(
    told_engine: Callable[..., str], work: Any, tmp_path: Path, group_is_gone: Callable[[int], bool]
) -> None:
    submitted = tmp_path / "submitted"
    python = told_engine(submitted=str(submitted))

    def computed_by(pool: EnginePool, bundle: str) -> int:
        with pool:
            pool.run_bundle(work.write_bundle(bundle), nothing)
        return int(submitted.read_text().split()[-2])

    with engine_ahead(ExecutionSpec(engine_python=python)):
        with engine_ahead(ExecutionSpec(engine_python=python, retries=7)):
            other = computed_by(pool_on_told_engines(work, python), "other")
        ahead = computed_by(pool_on_told_engines(work, python), "one")
        next_one = computed_by(pool_on_told_engines(work, python), "two")
    assert len({other, ahead, next_one}) == 3
    assert all(group_is_gone(process) for process in (other, ahead, next_one))


def test_the_log_of_an_engine_started_ahead_is_kept_too(told_engine: Callable[..., str], work: Any) -> None:
    python = told_engine(load_fault="no luck", prints="before")
    pool = pool_on_told_engines(work, python)
    with engine_ahead(ExecutionSpec(engine_python=python)), pytest.raises(TerminalError, match="no luck"), pool:
        pool.start()
        pool.run_bundle(work.write_bundle(), nothing)
    assert b"no luck" in work.store.read_bytes("logs/engine-0.log")


def test_an_engine_that_cannot_be_started_ahead_is_told_where_there_is_something_to_load(work: Any) -> None:
    with engine_ahead(ExecutionSpec(engine_python="/no/such/python")):
        with pool_on_told_engines(work, "/no/such/python") as pool:
            pool.start()
        with (
            pytest.raises(TerminalError, match="cannot start"),
            pool_on_told_engines(work, "/no/such/python") as pool,
        ):
            pool.run_bundle(work.write_bundle(), nothing)
