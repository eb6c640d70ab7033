"""`status`, `clean` and `run --retry-errors` on work folders as jobs leave them."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from batchllm_flows.cleaning import find_old_folders, parse_age
from batchllm_flows.last_error import LastError, read_last_error, remembered_failure
from batchllm_flows.run import JobRun, open_run
from batchllm_operators.errors import TerminalError
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.store import Store
from batchllm_operators.work.layout import JOB_FILE, LAST_ERROR_FILE, MANIFEST_FILE, REPORT_FILE, SAMPLES_FILE
from tests.commands.conftest import Batchllm
from tests.commands.job_folders import answer, complete, planned_job, write_job

DAY = 86400.0


def grow_old(work: Store, days: float) -> None:
    written = time.time() - days * DAY
    for one in Path(work.uri).rglob("*"):
        os.utime(one, (written, written))


@pytest.fixture
def half_done(tmp_path: Path, tiny_llama: str) -> JobRun:
    """7 requests of 8 rows, of which 3 are answered."""
    run, staged = planned_job(write_job(tmp_path, tiny_llama))
    answer(run, staged, 2, 5)
    return run


@pytest.fixture
def done(tmp_path: Path, tiny_llama: str) -> JobRun:
    run, staged = planned_job(write_job(tmp_path, tiny_llama))
    answer(run, staged, 0, 8)
    complete(run, staged)
    return run


def test_the_status_tells_how_far_a_job_is(batchllm: Batchllm, half_done: JobRun) -> None:
    for uri in (half_done.sink.uri, half_done.work.uri, str(Path(half_done.work.uri).parent)):
        found = json.loads(batchllm("status", uri, "--json").stdout)
        assert len(found) == 1
        assert (found[0]["job_id"], found[0]["complete"]) == (half_done.job_id, False)
        assert (found[0]["rows"], found[0]["requests"], found[0]["answered"], found[0]["left"]) == (8, 7, 3, 4)
        assert (found[0]["bundles"], found[0]["parts"], found[0]["last_error"]) == (1, 1, None)
    text = batchllm("status", half_done.sink.uri).stdout
    assert "questions: not complete" in text
    assert "3 of 7 requests in 1 part, 4 left" in text


def test_the_status_of_a_complete_job_and_of_two_in_one_sink(
    tmp_path: Path, batchllm: Batchllm, done: JobRun, tiny_llama: str
) -> None:
    assert "questions: complete" in batchllm("status", done.sink.uri).stdout
    other = write_job(tmp_path, tiny_llama, name="other", sampling={"max_tokens": 2}, sink__mode="overwrite")
    planned_job(other)
    found = json.loads(batchllm("status", done.sink.uri, "--json").stdout)
    assert [(one["job_name"], one["complete"]) for one in found] == [("other", False), ("questions", True)]
    assert (found[1]["rows"], found[1]["left"]) == (8, 0)


def test_a_failed_run_leaves_its_last_error_and_a_good_one_removes_it(batchllm: Batchllm, half_done: JobRun) -> None:
    with (
        pytest.raises(TerminalError),
        remembered_failure(half_done.work, print),
    ):
        raise TerminalError("no answer from http://user:password@host/path")
    last = read_last_error(half_done.work)
    assert last is not None
    assert (last.kind, last.message) == ("TerminalError", "no answer from http://host/path")
    assert "last error" in batchllm("status", half_done.sink.uri).stdout
    with remembered_failure(half_done.work, print):
        pass
    assert not half_done.work.exists(LAST_ERROR_FILE)


def test_the_error_of_a_run_is_told_though_its_work_folder_is_gone(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("a file where the folder should be")
    warnings: list[object] = []
    with (
        pytest.raises(TerminalError, match="the cause"),
        remembered_failure(Store(str(tmp_path / "work")), lambda *told: warnings.append(told)),
    ):
        raise TerminalError("the cause")
    assert len(warnings) == 1


def test_what_another_version_wrote_as_last_error_is_none(half_done: JobRun) -> None:
    half_done.work.write_bytes(LAST_ERROR_FILE, b'{"time": 3}')
    assert read_last_error(half_done.work) is None
    assert LastError.model_fields.keys() == {"time", "kind", "message"}


def test_clean_lists_and_deletes_only_with_yes(batchllm: Batchllm, half_done: JobRun) -> None:
    grow_old(half_done.work, 10)
    before = half_done.work.names()
    listed = batchllm("clean", half_done.sink.uri, "--older-than", "7d")
    assert listed.exit_code == 0
    assert f"delete  {half_done.work.uri}" in listed.stdout
    assert "abandoned" in listed.stdout
    assert "nothing is deleted without --yes" in listed.stdout
    assert half_done.work.names() == before
    deleted = batchllm("clean", half_done.sink.uri, "--older-than", "7d", "--yes")
    assert f"in {len(before)} objects" in deleted.stdout
    assert half_done.work.names() == []
    assert not Path(half_done.work.uri).exists()


def test_clean_keeps_output_and_report_of_a_complete_job(batchllm: Batchllm, done: JobRun) -> None:
    grow_old(done.work, 10)
    output = Store(done.sink.uri).objects("*")
    assert "complete" in batchllm("clean", done.sink.uri, "--yes").stdout
    assert set(done.work.names()) == {JOB_FILE, REPORT_FILE, SAMPLES_FILE}
    assert Store(done.sink.uri).objects("*") == output
    assert batchllm("verify", done.sink.uri).exit_code == 0
    # The job is still known to be complete, and a second cleaning finds nothing.
    assert open_run(done.job).complete is not None
    assert "the work folder was cleaned" in batchllm("status", done.sink.uri).stdout
    grow_old(done.work, 10)
    assert "0 bytes in 0 objects" in batchllm("clean", done.sink.uri).stdout


@pytest.mark.parametrize(("days", "older_than", "goes"), [(6, "7d", False), (8, "7d", True), (0.05, "0s", False)])
def test_clean_keeps_what_is_young_or_may_be_running(
    half_done: JobRun, days: float, older_than: str, goes: bool
) -> None:
    grow_old(half_done.work, days)
    found = find_old_folders(half_done.sink.uri, StorageOptions(), parse_age(older_than))
    assert [one.goes for one in found] == [goes]


def test_clean_keeps_folders_that_hold_data_or_that_it_does_not_understand(half_done: JobRun) -> None:
    def reasons() -> list[str]:
        grow_old(half_done.work, 10)
        found = find_old_folders(half_done.sink.uri, StorageOptions(), 0)
        assert not any(one.goes for one in found)
        return [one.reason for one in found]

    half_done.work.write_bytes(f"answers/{MANIFEST_FILE}", b"{}")
    assert reasons() == ["input or output of the job stands in it"]
    half_done.work.delete([f"answers/{MANIFEST_FILE}"])
    half_done.work.write_bytes(JOB_FILE, b'{"job_id": "x"}')
    assert "job.json is not as this version" in reasons()[0]


def test_clean_deletes_kept_answers_only_when_asked(batchllm: Batchllm, done: JobRun) -> None:
    names = ("20260101T000000-0123456789ab", "20991231T000000-0123456789ab")
    answers = Store(done.sink.uri).folder(f"_batchllm/answers/{'0f' * 16}")
    for segment in names:
        for ending in (".answers.parquet", ".filter", ".keys.parquet"):
            answers.write_bytes(segment + ending, b"x")
    answers.write_bytes("job.parts.json", b"[]")
    kept = answers.names()
    assert "kept answers" not in batchllm("clean", done.sink.uri, "--yes").stdout
    assert answers.names() == kept
    listed = batchllm("clean", done.sink.uri, "--answers-older-than", "90d").stdout
    assert "delete  kept answers: 3 bytes in 3 objects" in listed
    assert answers.names() == kept
    # Their folder may also be named alone, as `execution.reuse` can.
    assert batchllm("clean", answers.uri, "--answers-older-than", "90d", "--yes").exit_code == 0
    assert answers.names() == [name for name in kept if not name.startswith("2026")]
    foreign = Store(done.sink.uri).folder("mine")
    for name in ("2020.filter", "1-q.answers.parquet", "shop.parts.json", names[0] + ".filter"):
        foreign.write_bytes(name, b"precious")
    grow_old(foreign, 1000)
    batchllm("clean", done.sink.uri, "--answers-older-than", "90d", "--yes")
    assert len(foreign.names()) == 4, "names alone make nothing ours"
    grow_old(answers, 100)
    assert batchllm("clean", answers.uri, "--answers-older-than", "90d", "--yes").exit_code == 0
    assert answers.exists("job.parts.json"), "without it the job's answers would be kept anew"
    assert batchllm("clean", answers.uri, "--answers-older-than", "soon").exit_code == 2
    assert batchllm("clean", answers.uri, "--answers-older-than", "99999999999d").exit_code == 0
    nowhere = batchllm("clean", f"{done.sink.uri}/nowhere", "--answers-older-than", "90d")
    assert (nowhere.exit_code, "there is nothing here" in nowhere.output) == (1, True)


def test_clean_removes_what_killed_runs_have_left_unfinished(batchllm: Batchllm, done: JobRun) -> None:
    left = [Path(done.sink.uri, f".partial-0123456789ab-part-{number}.parquet") for number in range(2)]
    for path in left:
        path.write_bytes(b"half")
    os.utime(left[0], (time.time() - 8 * DAY, time.time() - 8 * DAY))
    assert "what killed runs have left of 1 object, in" in batchllm("clean", done.sink.uri, "--yes").stdout
    assert [path.exists() for path in left] == [False, True], "the other may be written now"


def test_clean_leaves_a_complete_job_without_report_as_it_is(done: JobRun) -> None:
    done.work.delete([REPORT_FILE])
    grow_old(done.work, 10)
    assert "without a report" in find_old_folders(done.sink.uri, StorageOptions(), 0)[0].reason


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("2m", 120), ("12h", 43200), ("7d", 604800), ("1w", 604800)]
)
def test_ages_have_a_unit(text: str, seconds: int) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["7", "d", "-1d", "7 days", ""])
def test_other_ages_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number with one of the units"):
        parse_age(text)


def test_a_complete_job_is_opened_again_only_for_errors_of_the_engine(tmp_path: Path, tiny_llama: str) -> None:
    run, staged = planned_job(write_job(tmp_path, tiny_llama))
    answer(run, staged, 0, 6)
    answer(run, staged, 6, 8, error="out of memory")
    complete(run, staged)
    first = open_run(run.job)
    assert first.complete is not None
    assert first.complete.error_rows == {"engine_error": 2}
    again = open_run(run.job, retry_errors=True)
    assert (again.complete, again.reopened) == (None, True)
    # Where the results are gone, all would be computed again: that is another wish.
    run.work.folder("results").remove()
    with pytest.raises(TerminalError, match=r"the results of this complete job are gone"):
        open_run(run.job, retry_errors=True)


def test_a_complete_job_without_such_errors_stays_complete(done: JobRun) -> None:
    run = open_run(done.job, retry_errors=True)
    assert run.complete is not None
    assert not run.reopened


def test_a_moved_output_is_the_complete_output_of_its_job(batchllm: Batchllm, done: JobRun) -> None:
    grow_old(done.work, 30)
    moved = Path(done.sink.uri).rename(f"{done.sink.uri}-moved")
    assert json.loads(batchllm("status", moved, "--json").stdout)[0]["complete"]
    (found,) = find_old_folders(str(moved), StorageOptions(), 7 * DAY)
    assert found.work.uri == str(moved / "_batchllm" / done.job_id)
    assert found.folders != (".",), "the report of a complete job stays"
    verified = json.loads(batchllm("verify", moved, "--json").stdout)
    assert verified["work_uris"] == [found.work.uri]
    assert batchllm("report", moved).exit_code == 0


def test_a_copy_of_an_output_stands_for_nothing_of_the_original(batchllm: Batchllm, done: JobRun) -> None:
    grow_old(done.work, 30)
    copy = Path(f"{done.sink.uri}-copy")
    shutil.copytree(done.sink.uri, copy)
    (found,) = find_old_folders(str(copy), StorageOptions(), 7 * DAY)
    assert found.work.uri == str(copy / "_batchllm" / done.job_id)
    shutil.rmtree(copy / "_batchllm")
    with pytest.raises(TerminalError, match="no job here"):
        find_old_folders(str(copy), StorageOptions(), 7 * DAY)
