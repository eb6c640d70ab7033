"""One run of a job at a time: the others wait, join, fail, or take over from one that has ended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest

from batchllm_flows import work_lease
from batchllm_flows.flows import batch_inference, plan_batch_inference
from batchllm_flows.job_status import job_statuses, status_text
from batchllm_flows.work_lease import LostLeaseError, WorkLease, clear_after_killed_run
from batchllm_operators.errors import TerminalError, TransientError
from batchllm_operators.execute.backends.inline import Script
from batchllm_operators.process_identity import ProcessIdentity, is_surely_gone, this_process
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.store import Store
from batchllm_operators.work.layout import LEASE_FILE
from batchllm_operators.work.lease import Lease, read_lease, write_lease
from tests.conftest import InlineEngines
from tests.flows.jobs import job, questions, read_output, write_input


@pytest.fixture
def work(place: tuple[str, StorageOptions]) -> Store:
    return Store(*place).folder("work")


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def lease(work: Store, lines: list[str]) -> Callable[..., WorkLease]:
    def make(on_concurrent: Any = "wait") -> WorkLease:
        return WorkLease(work, on_concurrent, "a-flow-run", lambda text, *values: lines.append(text % values))

    return make


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(work_lease, "POLL_SECONDS", 0.01)
    yield


def of_another_machine(work: Store, **changes: Any) -> Lease:
    """Leave the lease of a process of another machine, which nobody can tell to be alive."""
    elsewhere = ProcessIdentity(host="elsewhere", pid=1, place="another boot", started="1")
    mine = WorkLease(work, "fail")._lease
    other = mine.model_copy(update={"process": elsewhere, **changes})
    assert write_lease(work, other, work.object(LEASE_FILE))
    return other


def test_a_run_holds_the_lease_and_gives_it_back(work: Store, lease: Callable[..., WorkLease]) -> None:
    with lease() as held:
        held.require()
        found = read_lease(work)
        assert found is not None
        assert (found.fence, found.process, found.flow_run) == (1, this_process(), "a-flow-run")
        with pytest.raises(TerminalError, match=rf"another run of this job is under way: process {os.getpid()} on "):
            lease("fail").__enter__()
    assert not work.exists(LEASE_FILE)
    with pytest.raises(KeyboardInterrupt), lease():
        raise KeyboardInterrupt
    assert not work.exists(LEASE_FILE)


def test_who_waits_goes_on_when_the_other_has_ended(
    work: Store, lease: Callable[..., WorkLease], lines: list[str]
) -> None:
    with ThreadPoolExecutor(1) as other, lease():
        waiting = other.submit(lease().__enter__)
        wait_until(lambda: any("waits for another run" in line for line in lines))
        work.delete([LEASE_FILE])
        second = waiting.result()
        assert second.waited
    found = read_lease(work)
    assert found is not None, "what the first gives back is its own alone"
    second.__exit__(None, None, None)
    assert not work.exists(LEASE_FILE)


def test_a_run_of_a_process_that_has_ended_is_taken_over_at_once(
    work: Store, lease: Callable[..., WorkLease], lines: list[str]
) -> None:
    script = "from batchllm_operators.process_identity import this_process as t; print(t().model_dump_json())"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ended = ProcessIdentity.model_validate_json(told.stdout)
    assert is_surely_gone(ended)
    assert not is_surely_gone(this_process())
    of_another_machine(work, process=ended)
    with lease() as held:
        found = read_lease(work)
        assert found is not None
        assert (found.fence, held.waited) == (2, False)
    assert any("taken over from process" in line for line in lines)


def test_what_a_run_of_this_process_could_not_give_up_is_in_nobodys_way(
    work: Store, lease: Callable[..., WorkLease]
) -> None:
    of_another_machine(work, process=this_process())  # by a token that no run of this process holds
    with lease() as held:
        assert not held.waited
        refused = lease("fail")
        with pytest.raises(TerminalError, match="another run of this job is under way"), refused:
            pass


def test_the_lease_of_a_run_that_was_killed_at_its_very_end_goes_with_the_next_look(
    work: Store, lease: Callable[..., WorkLease]
) -> None:
    of_another_machine(work, process=this_process())
    clear_after_killed_run(work)
    assert not work.exists(LEASE_FILE)
    with lease():
        clear_after_killed_run(work)
        assert work.exists(LEASE_FILE), "that of a run that goes on stays"


def test_a_run_that_nobody_hears_of_is_taken_over_and_does_not_merge(
    work: Store, lease: Callable[..., WorkLease], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_lease, "STALE_SECONDS", 0.1)
    with lease() as frozen:
        mine = read_lease(work)
        assert mine is not None
        of_another_machine(work, token=mine.token)  # its process cannot be looked at from here
        with lease() as second:
            assert second.waited
            second.require()
            with pytest.raises(LostLeaseError, match="another run has taken this job over"):
                frozen.require()
    assert not work.exists(LEASE_FILE)


def test_a_run_that_is_heard_of_is_not_taken_over(
    work: Store, lease: Callable[..., WorkLease], monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr(work_lease, "STALE_SECONDS", 600.0)
    monkeypatch.setattr(work_lease, "RENEW_SECONDS", 0.02)
    with ThreadPoolExecutor(1) as other, lease() as first:
        waiting = other.submit(lease().__enter__)
        wait_until(lambda: (found := read_lease(work)) is not None and found.beat > 2)
        assert not waiting.done()
        first.require()
        first.__exit__(None, None, None)
        waiting.result().__exit__(None, None, None)
    assert not any("taken over" in line for line in lines)


def test_two_that_began_at_the_same_moment_go_on_side_by_side(
    work: Store, lease: Callable[..., WorkLease], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(work_lease, "RENEW_SECONDS", 0.02)
    with lease() as first:
        of_another_machine(work)  # as on a store without conditional writes
        wait_until(lambda: "began at the same moment" in caplog.text)
        first.require()
    assert work.exists(LEASE_FILE)


def test_faults_of_the_store_end_no_run(
    work: Store, lease: Callable[..., WorkLease], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(work_lease, "RENEW_SECONDS", 0.02)

    def fails(*_arguments: object) -> bool:
        raise TransientError("no answer")

    with lease() as held:
        with monkeypatch.context() as patch:
            patch.setattr(work_lease, "write_lease", fails)
            wait_until(lambda: caplog.text.count("could not be renewed") > 1)
        wait_until(lambda: (found := read_lease(work)) is not None and found.beat > 0)
        held.require()


@pytest.mark.usefixtures("prefect_server")
def test_two_runs_of_a_job_at_once_compute_it_once(
    tmp_path: Path, tiny_llama: str, inline_engines: InlineEngines
) -> None:
    begun, may_end = threading.Event(), threading.Event()
    answered = []

    def answer(request: Any) -> str:
        begun.set()
        may_end.wait(60)
        answered.append(request.key)
        return "once"

    inline_engines.script = Script(answer=answer)
    write_input(str(tmp_path / "in"), questions(20))
    execution = {"backend": "inline", "calibrate": False}
    this_job = job(str(tmp_path / "in"), str(tmp_path / "out"), tiny_llama, execution=execution)
    failing = this_job.model_copy(update={"execution": this_job.execution.model_copy(update={"on_concurrent": "fail"})})
    with ThreadPoolExecutor(2) as runs:
        first = runs.submit(copy_context().run, batch_inference, this_job)
        assert begun.wait(60)
        with pytest.raises(TerminalError, match="another run of this job is under way: process"):
            batch_inference(failing)
        with pytest.raises(TransientError, match="a run of this job is under way"):
            plan_batch_inference(this_job)
        (status,) = job_statuses(str(tmp_path / "out"), StorageOptions())
        assert f"  running    process {os.getpid()} on " in status_text(status)
        second = runs.submit(copy_context().run, batch_inference, this_job)
        may_end.set()
        reports = [first.result(), second.result()]
    assert [report.already_complete for report in reports] == [False, True]
    assert len(answered) == len(set(answered)) == 19
    assert len(read_output(str(tmp_path / "out"))) == 20
    assert not list(tmp_path.glob(f"out/_batchllm/*/{LEASE_FILE}"))


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(6000):
        if is_so():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to be within a minute")
