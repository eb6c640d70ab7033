"""Earlier runs of the job of the same name."""

import os
from pathlib import Path

import orjson
import pytest

from batchllm_operators.plan.earlier import earlier_runs
from batchllm_operators.plan.planning import plan_requests
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.planning import PlanningSpec
from batchllm_operators.store import Store
from tests.plan.staged_jobs import planned_rows, stage_prompts, write_results


def job_folder(sink: Path, job_id: str, name: str, **spec: str) -> Store:
    work = Store(str(sink / "_batchllm" / job_id))
    work.write_bytes("job.json", orjson.dumps({"format_version": 1, "job_id": job_id, "job": {"name": name, **spec}}))
    return work


def test_only_other_runs_of_the_same_name_and_task_are_found(tmp_path: Path) -> None:
    work = job_folder(tmp_path, "aaaa", "nightly")
    job_folder(tmp_path, "bbbb", "weekly")
    same = job_folder(tmp_path, "cccc", "nightly", task="generate")
    job_folder(tmp_path, "eeee", "nightly", task="embed")
    Store(str(tmp_path / "_batchllm" / "dddd")).write_bytes("job.json", b"not JSON")
    assert [one.uri for one in earlier_runs(work.uri, StorageOptions())] == [same.uri]


def test_a_work_folder_in_an_unusual_place_has_no_neighbours(tmp_path: Path) -> None:
    assert earlier_runs(str(tmp_path / "work"), StorageOptions()) == []
    assert earlier_runs(str(tmp_path / "_batchllm" / "aaaa"), StorageOptions()) == []


@pytest.mark.parametrize("same", [True, False])
def test_lengths_of_an_earlier_run_are_expected_again(tmp_path: Path, same: bool) -> None:
    work, earlier = job_folder(tmp_path, "aaaa", "nightly"), job_folder(tmp_path, "bbbb", "nightly")
    prompts = [[number] * 9 for number in range(8)]
    write_results(earlier, prompts if same else [[99, 98]], completion_tokens=3)
    plan = plan_requests(
        work, stage_prompts(work, prompts), PlanningSpec(), earlier=earlier_runs(work.uri, StorageOptions())
    )
    assert {row["expected_output_tokens"] for row in planned_rows(work, plan)} == {3}
    assert plan.forecast.estimate_sources == {"same_request" if same else "job": 8}
    assert plan.counts.requests == 8, "results of another job are learnt from, not taken"


def test_the_newest_runs_are_taken_whatever_their_ids(tmp_path: Path) -> None:
    work = job_folder(tmp_path, "own", "nightly")
    for hours, job_id in enumerate(("m", "z", "a", "k", "b")):
        job_folder(tmp_path, job_id, "nightly")
        os.utime(tmp_path / "_batchllm" / job_id / "job.json", (0, 3600 * hours))
    found = earlier_runs(work.uri, StorageOptions())
    assert [one.uri.rpartition("/")[2] for one in found] == ["b", "k", "a"]
