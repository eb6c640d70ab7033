"""A work folder of another job, and input that is not what the job began with: never an answer to the wrong row."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm_flows.run import open_run
from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import open_source
from batchllm_operators.plan.earlier import earlier_runs
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.stage.staging import stage_rows
from batchllm_operators.store import Store
from batchllm_operators.work.layout import JOB_FILE, MANIFEST_FILE, STAGED_SUMMARY
from tests.faults.damage import damage, truncate
from tests.faults.told_jobs import ToldJob, texts, told_answer

OTHER_JOBS: dict[str, dict[str, Any]] = {
    "another prompt": {"prompt__template": "{{ text }} again"},
    "other sampling": {"sampling__max_tokens": 7},
    "other columns": {"source__columns": ["text"]},
}


@pytest.fixture
def told(tiny_llama: str, tmp_path: Path) -> ToldJob:
    job = ToldJob(tmp_path, tiny_llama)
    job.write_input(texts())
    return job


def right(job: ToldJob, output: pa.Table, template: str = "{{ text }}") -> bool:
    """Whether every row has the answer to its own prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    prompts = [template.replace("{{ text }}", text) for text in output["text"].to_pylist()]
    return output["completion"].to_pylist() == [told_answer(tokenizer(prompt)["input_ids"]) for prompt in prompts]


@pytest.mark.parametrize("changes", OTHER_JOBS.values(), ids=OTHER_JOBS.keys())
def test_jobs_that_share_a_place_for_work_share_nothing_else(told: ToldJob, changes: dict[str, Any]) -> None:
    place = {"execution__work_uri": str(told.folder / "work")}
    assert right(told, told.output(told.run(**place).manifest))
    second = told.run(**place, **changes, sink__mode="overwrite")
    assert right(told, told.output(second.manifest), changes.get("prompt__template", "{{ text }}"))
    assert second.computed == 20
    folders = sorted(path.name for path in (told.folder / "work").iterdir())
    assert len(folders) == 2
    assert second.manifest.job_id in folders
    assert second.manifest.work_uri == str(told.folder / "work" / second.manifest.job_id)


def test_the_next_days_input_is_answered_anew_in_the_same_place_for_work(told: ToldJob) -> None:
    place = {"execution__work_uri": str(told.folder / "work")}
    first = told.run(**place)
    told.write_input(texts(of="next day"))
    second = told.run(**place, sink__mode="overwrite")
    assert second.manifest.job_id != first.manifest.job_id
    assert right(told, told.output(second.manifest))
    neighbours = earlier_runs(second.manifest.work_uri, StorageOptions())
    assert [work.uri for work in neighbours] == [first.manifest.work_uri], "output lengths are learnt from it"


def test_a_work_folder_that_holds_another_job_is_refused_with_both_ids(told: ToldJob) -> None:
    first = told.run().manifest
    other = told.work(sampling__max_tokens=7)
    shutil.copytree(first.work_uri, other.uri)
    identity = other.uri.rpartition("/")[2]
    with pytest.raises(TerminalError, match=f"holds job {first.job_id}, this is job {identity}") as caught:
        told.run(sampling__max_tokens=7, sink__mode="overwrite")
    assert caught.value.uri == other.uri
    content = orjson.loads(other.read_bytes(JOB_FILE))
    assert content["job_id"] == first.job_id


def test_input_replaced_before_it_is_staged_is_refused_and_never_used_when_it_is_put_back(told: ToldJob) -> None:
    job = told.spec()
    path = told.folder / "in" / "a.parquet"
    shutil.copy2(path, told.folder / "kept")
    run = open_run(job)
    told.write_input(texts(of="another"))
    with pytest.raises(TerminalError, match=r"a\.parquet was replaced.*run the job again"):
        stage_rows(open_source(job.source), job.prompt, job.sampling, job.model, run.work, fingerprint=run.objects)
    assert run.work.names("staged") == []
    # As if it had been staged all the same, by whoever uses the step without a fingerprint.
    stage_rows(open_source(job.source), job.prompt, job.sampling, job.model, run.work)
    shutil.copy2(told.folder / "kept", path)
    assert open_run(job).job_id == run.job_id
    assert right(told, told.output(told.run().manifest))


def test_input_replaced_while_it_is_staged_is_refused_and_leaves_nothing_staged(told: ToldJob) -> None:
    job = told.spec()
    run = open_run(job)

    def replace(_step: object, _rows: int) -> None:
        told.write_input(texts(of="another"))

    with pytest.raises(TerminalError, match=r"a\.parquet was replaced"):
        stage_rows(
            open_source(job.source), job.prompt, job.sampling, job.model, run.work, fingerprint=run.objects,
            progress=replace,
        )  # fmt: skip
    assert not run.work.exists(STAGED_SUMMARY)


def test_input_that_grows_while_it_is_staged_is_refused(told: ToldJob) -> None:
    job = told.spec()

    def grow(_step: object, _rows: int) -> None:
        pq.write_table(texts(3), told.folder / "in" / "b.parquet")

    with pytest.raises(TerminalError, match=r"b\.parquet is new"):
        stage_rows(open_source(job.source), job.prompt, job.sampling, job.model, told.work(), progress=grow)


def test_input_replaced_while_it_is_merged_by_one_of_as_many_rows_leaves_no_output(
    told: ToldJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    from batchllm_operators.formats.parquet_source import ParquetSource

    tables = ParquetSource.tables

    def replaced_behind(self: ParquetSource, schema: pa.Schema, rows: None) -> Any:
        yield from tables(self, schema, rows)
        told.write_input(texts(of="another"))

    with monkeypatch.context() as patch:
        # Staging reads by it too: only the merge of a job that is staged already is meant.
        told.run()
        told.sink.delete([MANIFEST_FILE])
        patch.setattr(ParquetSource, "tables", replaced_behind)
        with pytest.raises(TerminalError, match=r"a\.parquet was replaced"):
            told.run(sink__mode="overwrite")
    assert not told.sink.exists(MANIFEST_FILE)


def test_what_another_prompt_has_staged_is_not_taken_by_who_uses_the_step_alone(told: ToldJob) -> None:
    job, work = told.spec(), told.work()
    first = stage_rows(open_source(job.source), job.prompt, job.sampling, job.model, work)
    again = stage_rows(open_source(job.source), job.prompt, job.sampling, job.model, work)
    assert again == first
    other = told.spec(prompt__template="{{ text }} again")
    second = stage_rows(open_source(other.source), other.prompt, other.sampling, other.model, work)
    assert second.prompt_tokens == first.prompt_tokens + 24


def test_a_work_folder_of_an_older_format_is_neither_used_nor_changed(
    told: ToldJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("batchllm_flows.job.FORMAT_VERSION", 1)
        first = told.run().manifest
    before = Store(first.work_uri).objects()
    second = told.run(sink__mode="overwrite")
    assert (second.computed, second.manifest.work_uri == first.work_uri) == (20, False)
    assert Store(first.work_uri).objects() == before


def test_damaged_results_of_an_earlier_job_are_left_where_they_are(told: ToldJob) -> None:
    first = told.run().manifest
    earlier = Store(first.work_uri)
    for name in earlier.names("results"):
        damage(earlier, name, truncate)
    before = earlier.objects()
    second = told.run(sampling__max_tokens=7, sink__mode="overwrite")
    assert [work.uri for work in earlier_runs(second.manifest.work_uri, StorageOptions())] == [earlier.uri]
    assert earlier.objects() == before
    assert right(told, told.output(second.manifest))


def test_a_file_that_was_only_touched_is_another_version_of_the_input(told: ToldJob) -> None:
    job = told.spec()
    before = job.job_id(open_source(job.source).objects)
    os.utime(told.folder / "in" / "a.parquet", (0, 0))
    assert job.job_id(open_source(job.source).objects) != before
