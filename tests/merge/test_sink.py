"""Whose output a folder holds, and what may be written there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.merge.claim import IN_PROGRESS_FILE, SinkClaim
from batchllm_operators.merge.sink import check_sink
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store
from batchllm_operators.work.layout import MANIFEST_FILE

from .conftest import JOB_ID, Job, answer, plain


def interrupted(job: Job) -> None:
    """What a merge leaves that is killed while it writes: its claim, and a file."""
    claim = SinkClaim(job.sink, JOB_ID, "error").__enter__()
    job.sink.write_bytes(claim.file_name(0, "parquet"), b"half of it")


def test_an_empty_folder_may_be_written(job: Job) -> None:
    assert check_sink(job.sink, "error", JOB_ID) is None


def test_output_that_is_complete_is_not_written_again(job: Job) -> None:
    job.answer_all()
    manifest = job.merge()
    before = job.sink.objects()
    assert check_sink(job.sink, "error", JOB_ID) == manifest
    assert job.merge() == manifest
    assert job.sink.objects() == before


@pytest.mark.parametrize("change", [{"format": "jsonl"}, {"rows_per_file": 4}, {"prefix": "llm_"}])
def test_output_that_is_wanted_in_another_layout_is_written_again(job: Job, change: dict[str, Any]) -> None:
    job.answer_all()
    before = job.merge()
    after = job.merge(**change)
    assert after.layout != before.layout
    assert {file.name for file in after.files}.isdisjoint(file.name for file in before.files)
    assert {name for name in job.sink.names() if name.startswith("part-")} == {file.name for file in after.files}
    assert job.merge(**change) == after


def test_output_that_lost_a_file_is_written_again(job: Job) -> None:
    job.answer_all()
    manifest = job.merge(rows_per_file=4)
    job.sink.delete([manifest.files[1].name])
    assert check_sink(job.sink, "error", JOB_ID) is None
    again = job.merge(rows_per_file=4)
    assert [(plain(file.name), file.digest) for file in again.files] == [
        (plain(file.name), file.digest) for file in manifest.files
    ]
    assert len(job.output(again)) == 10


def test_another_jobs_output_is_refused_with_both_ids_and_advice(job: Job) -> None:
    job.answer_all()
    job.merge(job_id="other-job")
    before = job.sink.objects()
    with pytest.raises(TerminalError, match=rf"output of job other-job \('test'\), this is job {JOB_ID}.*overwrite"):
        job.merge()
    assert job.sink.objects() == before


def test_part_files_of_unknown_origin_are_refused(job: Job) -> None:
    job.answer_all()
    job.sink.write_bytes("part-00000.parquet", b"precious")
    with pytest.raises(TerminalError, match="part files without a manifest"):
        job.merge()
    assert job.sink.read_bytes("part-00000.parquet") == b"precious"


def test_a_manifest_of_another_kind_is_refused(job: Job) -> None:
    job.answer_all()
    job.sink.write_bytes(MANIFEST_FILE, b'{"who": "somebody else"}')
    with pytest.raises(TerminalError, match="the manifest there is not one of ours"):
        job.merge()
    assert job.merge(mode="overwrite").rows == 10


def test_other_files_and_the_work_folder_do_not_matter(job: Job) -> None:
    job.answer_all()
    for name in ("notes.txt", "_batchllm/x/staged/part-00000.parquet", "deep/part-00000.parquet"):
        job.sink.write_bytes(name, b"content")
    job.merge()
    assert set(map(plain, job.sink.names())) == {
        "notes.txt", "_batchllm/x/staged/part-00000.parquet", "deep/part-00000.parquet", MANIFEST_FILE,
        "part-00000.parquet",
    }  # fmt: skip


@pytest.mark.parametrize("old", ["complete", "unknown"])
def test_overwrite_leaves_nothing_of_the_old_output(job: Job, old: str) -> None:
    job.answer_all()
    job.merge(job_id="other-job", rows_per_file=2)
    if old == "unknown":
        job.sink.delete([MANIFEST_FILE])
    manifest = job.merge(mode="overwrite")
    assert manifest.job_id == JOB_ID
    assert list(map(plain, job.sink.names())) == [MANIFEST_FILE, "part-00000.parquet"]


def test_overwrite_leaves_the_old_output_where_there_is_nothing_to_write(job: Job) -> None:
    job.answer_all()
    job.merge(job_id="other-job")
    before = job.sink.objects()
    job.work.delete(job.work.names("results"))
    with pytest.raises(TerminalError, match="no result"):
        job.merge(mode="overwrite")
    assert job.sink.objects() == before


def test_an_interrupted_merge_of_the_same_job_goes_on(job: Job) -> None:
    job.answer_all()
    interrupted(job)
    assert not job.sink.exists(MANIFEST_FILE)
    manifest = job.merge(rows_per_file=4)
    assert len(job.output(manifest)) == 10
    assert list(map(plain, job.sink.names())) == [MANIFEST_FILE, *(f"part-{n:05d}.parquet" for n in range(3))]


def test_an_interrupted_merge_of_another_job_is_refused(job: Job) -> None:
    job.answer_all()
    interrupted(job)
    with pytest.raises(TerminalError, match=f"unfinished output of job {JOB_ID}, this is job other-job"):
        job.merge(job_id="other-job")
    assert job.merge(job_id="other-job", mode="overwrite").job_id == "other-job"


@pytest.mark.parametrize("content", [b"not JSON", b"[]", b"{}", b""])
def test_a_claim_of_another_kind_is_refused_and_named(job: Job, content: bytes) -> None:
    job.answer_all()
    interrupted(job)
    job.sink.write_bytes(IN_PROGRESS_FILE, content)
    with pytest.raises(TerminalError, match=r"the _in_progress\.json there is not one of ours.*overwrite"):
        job.merge()
    assert job.merge(mode="overwrite").rows == 10


def test_a_claim_of_another_kind_without_any_output_is_in_nobodys_way(job: Job) -> None:
    job.answer_all()
    job.sink.write_bytes(IN_PROGRESS_FILE, b"not JSON")
    assert job.merge().rows == 10
    assert not job.sink.exists(IN_PROGRESS_FILE)


def test_an_overwrite_that_fails_leaves_the_old_output_complete(job: Job) -> None:
    job.answer_all()
    job.merge(job_id="other-job")
    before = job.sink.objects()
    whole = (job.folder / "input" / "a.parquet").read_bytes()
    pq.write_table(pa.Table.from_pylist(job.rows[:7], job.schema), job.folder / "input" / "a.parquet")
    job.fingerprint = job.source().objects
    with pytest.raises(TerminalError, match="changed while it was read"):
        job.merge(mode="overwrite", rows_per_file=2)
    assert job.sink.objects() == before
    (job.folder / "input" / "a.parquet").write_bytes(whole)
    job.fingerprint = job.source().objects
    assert job.merge(mode="overwrite").job_id == JOB_ID


def test_a_sink_that_is_the_folder_of_the_input_is_refused(job: Job) -> None:
    job.answer_all()
    job.sink = Store(str(job.folder / "input"))
    with pytest.raises(TerminalError, match="the folder holds input of this job"):
        job.merge(mode="overwrite")
    assert (job.folder / "input" / "a.parquet").exists()


def test_output_is_written_to_and_read_from_s3(job: Job, bucket: str) -> None:
    job.answer_all()
    job.sink = Store(f"{bucket}/output")
    manifest = job.merge(rows_per_file=3)
    assert job.output(manifest) == job.expected({name: answer(name) for name in job.requests if name})
    assert check_sink(job.sink, "error", JOB_ID) == manifest


def test_the_task_merges_within_a_flow_of_the_users(prefect_server: None, job: Job, tmp_path: Path) -> None:
    from prefect import flow

    from batchllm_operators.merge.task import merge

    job.answer_all()

    @flow
    def pipeline() -> Any:
        return merge(
            SourceSpec(uri=str(job.folder / "input"), format="parquet"),
            job.stage,
            SinkSpec(uri=job.sink.uri),
            job.work.uri,
            job_id=JOB_ID,
            job_name="test",
            fingerprint=job.fingerprint,
            max_error_fraction=0.1,
        )

    assert pipeline().rows == 10
    assert job.sink.exists(MANIFEST_FILE)
