"""The pool's own rules, on handles that do as they are told; real engines are in the other modules."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from batchllm_operators.errors import BatchLLMError, TerminalError, TransientError
from batchllm_operators.execute.handle import ProgressCallback
from batchllm_operators.execute.messages import BundleCounts, BundleDone, Load, Run
from batchllm_operators.execute.pool import EnginePool
from batchllm_operators.execute.spec import ExecutionSpec, ModelSpec
from batchllm_operators.stage.spec import SamplingParameters, SamplingSpec


class ToldHandle:
    """Answers a bundle with what the test has put in `faults`, else with success; remembers its commands."""

    def __init__(self) -> None:
        self.usable = True
        self.loads: list[Load] = []
        self.runs: list[Run] = []
        self.load_fault: BatchLLMError | None = None
        self.faults: list[BatchLLMError] = []
        self.entered = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.closed = False

    def load(self, command: Load) -> float:
        self.loads.append(command)
        if self.load_fault is not None:
            self.usable = False
            raise self.load_fault
        return 0.0

    def run_bundle(self, command: Run, on_progress: ProgressCallback, on_part: Callable[[str], None]) -> BundleDone:
        self.runs.append(command)
        on_progress(command.bundle, BundleCounts())
        part = f"results/part-{len(self.runs)}.parquet"
        on_part(part)
        self.entered.set()
        assert self.may_go_on.wait(30)
        if self.closed:
            raise TerminalError("closed")
        if self.faults:
            self.usable = False
            raise self.faults.pop(0)
        return BundleDone(counts=BundleCounts(requests=1), parts=(*command.known_parts, part), seconds=1.0)

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
