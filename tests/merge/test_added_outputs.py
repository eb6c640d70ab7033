"""Outputs that runs add to one sink: each has a manifest of its own, and stands in folders where the job wants that."""

from __future__ import annotations

import datetime
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.merge.claim import SinkClaim
from batchllm_operators.merge.folders import FolderSpill
from batchllm_operators.merge.merging import merge_results
from batchllm_operators.merge.sink import all_manifests, newest_added_manifest
from batchllm_operators.records import Manifest
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.store import Store
from batchllm_operators.work.layout import manifest_name

from .conftest import Job, answer


def added(job: Job, sink: Store, night: str, *, job_id: str, **fields: object) -> Manifest:
    spec = SinkSpec.model_validate({"uri": sink.uri, "mode": "append", **fields})
    return merge_results(
        job.source(), job.stage, job.work, sink, spec, job_id=job_id, job_name="test", fingerprint=job.fingerprint,
        max_error_fraction=1.0, slice_id=night,
    )  # fmt: skip


def night(folder: Path, rows: int, answers: str) -> Job:
    job = Job(folder, list(range(rows)))
    job.add_results(*(answer(number, answers) for number in range(rows)))
    return job


def read(sink: Store) -> list[str]:
    """The completions, as whoever follows the manifests sees them; every file is listed."""
    manifests = all_manifests(sink)
    names = [file.name for manifest in manifests for file in manifest.files]
    assert sorted(names) == [name for name in sink.names() if not name.startswith("_")]
    assert sink.names("_manifests") == [manifest_name(one.slice_id) for one in manifests], "no claim is left"
    return [
        row for name in names for row in pq.read_table(pa.BufferReader(sink.read_bytes(name)))["completion"].to_pylist()
    ]


def test_a_night_that_is_run_again_replaces_its_own_output_alone(tmp_path: Path) -> None:
    sink = Store(str(tmp_path / "sink"))
    first = added(night(tmp_path / "1", 3, "monday"), sink, "a1", job_id="j1")
    second = added(night(tmp_path / "2", 2, "tuesday"), sink, "b2", job_id="j2")
    assert read(sink) == ["monday 0", "monday 1", "monday 2", "tuesday 0", "tuesday 1"]
    late = night(tmp_path / "3", 4, "late monday")
    added(late, sink, "a1", job_id="j3", rows_per_file=2)
    assert read(sink) == [f"late monday {n}" for n in range(4)] + ["tuesday 0", "tuesday 1"]
    before = sink.objects()
    again = added(late, sink, "a1", job_id="j3", rows_per_file=2)
    assert sink.objects() == before
    assert newest_added_manifest(sink) == again
    assert {first.slice_id, second.slice_id} == {"a1", "b2"}


def test_who_follows_manifests_sees_no_half_output_and_leftovers_go_with_the_next_run(tmp_path: Path) -> None:
    sink = Store(str(tmp_path / "sink"))
    added(night(tmp_path / "1", 2, "old"), sink, "a1", job_id="j1")
    killed = SinkClaim(sink, "j2", "append", "a1").__enter__()
    sink.write_bytes(killed.file_name(0, "parquet"), b"half of it")
    (manifest,) = all_manifests(sink)
    assert [file.rows for file in manifest.files] == [2]
    other = added(night(tmp_path / "2", 1, "other"), sink, "c3", job_id="j3")
    assert sink.exists(killed.file_name(0, "parquet")), "another night's is not ours to remove"
    added(night(tmp_path / "3", 2, "new"), sink, "a1", job_id="j2")
    assert read(sink) == ["new 0", "new 1", "other 0"]
    assert other.rows == 1


def test_one_output_and_added_ones_do_not_mix(tmp_path: Path) -> None:
    sink = Store(str(tmp_path / "sink"))
    job = night(tmp_path / "1", 2, "x")
    job.sink = sink
    job.merge()
    with pytest.raises(TerminalError, match="sink: holds one whole output, to which none can be added"):
        added(job, sink, "a1", job_id="j1")
    other = Store(str(tmp_path / "other"))
    added(job, other, "a1", job_id="j1")
    job.sink = other
    for mode in ("error", "overwrite"):
        with pytest.raises(TerminalError, match="sink: holds outputs that runs have added"):
            job.merge(mode=mode)
    assert len(read(other)) == 2


@pytest.mark.parametrize("jsonl", [False, True])
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_rows_stand_in_folders_by_their_values_in_their_order(tmp_path: Path, form: str, jsonl: bool) -> None:
    job = Job(tmp_path / "job", list(range(9)), jsonl=jsonl)
    job.rows = [{"n": n % 3, "name": ("a/b", "c", None)[n // 3]} for n in range(9)]
    if jsonl:
        (tmp_path / "job" / "input" / "a.jsonl").write_bytes(b"\n".join(map(orjson.dumps, job.rows)))
    else:
        pq.write_table(pa.Table.from_pylist(job.rows, job.schema), tmp_path / "job" / "input" / "a.parquet")
    job.fingerprint = job.source().objects
    job.answer_all()
    sink = Store(str(tmp_path / "sink"))
    fields = {"mode": "partition", "partition_by": ["name", "n"], "format": form, "rows_per_file": 2}
    manifest = added(job, sink, "a1", job_id="j1", **fields)
    assert manifest.rows == sum(file.rows for file in manifest.files) == 9
    folders = [file.name.rpartition("/")[0] for file in manifest.files]
    names = ["a%2Fb", "c", "__HIVE_DEFAULT_PARTITION__"]
    assert sorted(set(folders)) == sorted(f"name={name}/n={n}" for name in names for n in range(3))
    if form == "parquet":
        table = ds.dataset(sink.uri, format="parquet", partitioning="hive").to_table().sort_by("completion")
        assert table["name"].to_pylist() == [row["name"] for row in job.rows]
        assert table["n"].to_pylist() == [row["n"] for row in job.rows]
        assert table["completion"].to_pylist() == [f"answer {n}" for n in range(9)]
    else:
        lines = [orjson.loads(line) for name in sink.names("name=c") for line in sink.read_bytes(name).splitlines()]
        assert [(row["name"], row["n"], row["completion"]) for row in lines] == [
            ("c", n, f"answer {n + 3}") for n in range(3)
        ]
    again = added(job, sink, "a1", job_id="j2", **fields)
    assert sorted(file.name for file in again.files) == [name for name in sink.names() if not name.startswith("_")]


@pytest.mark.parametrize("jsonl", [False, True])
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_only_the_columns_that_the_sink_asks_for_are_carried(tmp_path: Path, form: str, jsonl: bool) -> None:
    job = Job(tmp_path / "job", list(range(3)), jsonl=jsonl)
    job.answer_all()
    manifest = job.merge(format=form, carry=["name"])
    if form == "parquet":
        names = pq.read_table(pa.BufferReader(job.sink.read_bytes(manifest.files[0].name))).column_names
    else:
        names = list(orjson.loads(job.sink.read_bytes(manifest.files[0].name).splitlines()[0]))
    assert names[:2] == ["name", "completion"]
    assert "n" not in names
    with pytest.raises(TerminalError, match=r"sink\.carry: no such column: nothing; there is n, name"):
        job.merge(format=form, carry=["nothing"])


def test_columns_that_name_no_folders_are_refused_and_the_sink_is_as_it_was(tmp_path: Path) -> None:
    job = night(tmp_path / "job", 2, "x")
    sink = Store(str(tmp_path / "sink"))
    for column, message in (
        ("nothing", "sink.partition_by: no such output column: nothing; columns: n, name, completion"),
        ("error", "sink.partition_by: expected a column of text, integers, booleans or dates, 'error' is struct"),
    ):
        with pytest.raises(TerminalError, match=message):
            added(job, sink, "a1", job_id="j1", mode="partition", partition_by=[column])
        assert sink.names() == []


def test_more_folders_than_files_may_be_open_keep_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = pa.schema([("day", pa.date32()), ("n", pa.int64())])
    days = [datetime.date(2026, 1, 1) + datetime.timedelta(days=n % 100) for n in range(1000)]
    table = pa.table({"day": days, "n": range(1000)}, schema=schema)
    spill = FolderSpill(tmp_path, schema, ["day"], [0], [0])
    for start in range(0, 1000, 150):
        spill.add(table.slice(start, 150))
    found = {name: pa.concat_tables(rows)["n"].to_pylist() for name, rows in spill.in_folders()}
    assert found == {f"day={day}/": list(range(n, 1000, 100)) for n, day in enumerate(days[:100])}
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("batchllm_operators.merge.folders.MOST_FOLDERS", 50)
    with pytest.raises(TerminalError, match="the values of day name more than 50 folders"):
        FolderSpill(tmp_path, schema, ["day"], [0], [0]).add(table)
