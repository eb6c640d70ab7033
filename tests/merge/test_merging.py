"""The output of a job: one row for each input row, or none at all."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchllm_operators.errors import TerminalError
from batchllm_operators.records import OutputSamples
from batchllm_operators.work.layout import MANIFEST_FILE, SAMPLES_FILE
from tests.generation import OUTPUT_FIELDS

from .conftest import JOB_ID, Job, answer, engine_error, error_counts, plain


def results_of(job: Job) -> dict[str | int, dict[str, Any]]:
    return {name: answer(name) for name in job.requests if name is not None}


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_every_row_gets_its_answer_in_input_order(job: Job, form: str) -> None:
    job.answer_all()
    manifest = job.merge(format=form, rows_per_file=4)
    assert [(plain(file.name), file.rows) for file in manifest.files] == [
        (f"part-0000{n}.{form}", rows) for n, rows in enumerate((4, 4, 2))
    ]
    assert job.output(manifest) == job.expected(results_of(job))


def test_the_manifest_counts_rows_and_distinct_requests(job: Job) -> None:
    job.answer_all()
    manifest = job.merge()
    assert (manifest.rows, manifest.error_rows) == (10, {"invalid_row": 1})
    assert manifest.prompt_tokens == 9 * 10
    assert (manifest.computed_prompt_tokens, manifest.cached_tokens) == (6 * 6, 6 * 4)
    assert manifest.completion_tokens == 6 * 2
    assert (manifest.job_id, manifest.work_uri) == (JOB_ID, job.work.uri)
    assert orjson.loads(job.sink.read_bytes(MANIFEST_FILE)) == orjson.loads(manifest.model_dump_json())
    assert list(map(plain, job.sink.names())) == [MANIFEST_FILE, "part-00000.parquet"]


def test_the_output_has_the_input_columns_then_the_output_columns(job: Job) -> None:
    job.answer_all()
    with job.sink.parquet(job.merge().files[0].name) as file:
        assert file.schema_arrow == pa.schema([*job.schema, *OUTPUT_FIELDS])


def test_a_copy_without_error_is_taken_wherever_it_stands(job: Job) -> None:
    job.add_results(engine_error("a"), answer("b", "first"), engine_error("c"))
    job.add_results(engine_error("b"), answer("a"), answer("c"), engine_error("c"))
    job.add_results(answer("a", "late"), answer("d"), answer("e"), answer("f"), answer("unknown"))
    output = job.output(job.merge())
    assert output == job.expected(results_of(job) | {"b": answer("b", "first")})


def test_an_engines_error_goes_to_all_rows_of_its_request(job: Job) -> None:
    job.add_results(engine_error("a"), *(answer(name) for name in "bcdef"))
    manifest = job.merge()
    assert manifest.error_rows == {"engine_error": 3, "invalid_row": 1}
    output = job.output(manifest)
    assert output == job.expected(results_of(job) | {"a": engine_error("a")})
    assert error_counts(output) == manifest.error_rows


def test_requests_without_a_result_fail_the_job_and_are_named(job: Job) -> None:
    job.add_results(answer("b"), answer("c"), answer("d"), answer("e"))
    with pytest.raises(
        TerminalError, match=r"2 of 6 requests have no result \(4 rows, the first: id-0, id-2, id-6, id-9"
    ):
        job.merge()
    assert job.sink.names() == []


def test_an_unreadable_result_part_counts_as_not_computed(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    job.answer_all()
    job.work.write_bytes("results/part-zzz.parquet", b"damaged")
    assert len(job.output(job.merge())) == 10
    assert "part-zzz.parquet" in caplog.text
    job.work.write_bytes("results/part-00000.parquet", b"damaged")
    with pytest.raises(TerminalError, match="6 of 6 requests have no result"):
        job.merge(job_id="other", mode="overwrite")


def test_too_many_errors_fail_the_job_with_counts_and_examples(job: Job) -> None:
    job.add_results(engine_error("a"), *(answer(name) for name in "bcdef"))
    with pytest.raises(TerminalError, match=r"4 of 10 rows have errors, more than max_error_fraction 0\.39") as caught:
        job.merge(max_error_fraction=0.39)
    assert "engine_error 3, invalid_row 1" in str(caught.value)
    assert "row id-4: blank" in str(caught.value)
    assert "row id-0: no luck with a" in str(caught.value)
    assert job.sink.names() == []
    assert job.merge(max_error_fraction=0.4).rows == 10


def test_input_that_changed_is_refused_and_named(job: Job) -> None:
    job.answer_all()
    folder = job.folder / "input"
    pq.write_table(pa.table({"n": [1], "name": ["x"]}), folder / "b.parquet")
    with pytest.raises(TerminalError, match=r"b\.parquet is new"):
        job.merge()
    (folder / "a.parquet").rename(folder / "b.parquet")
    with pytest.raises(TerminalError, match=r"a\.parquet is gone, b\.parquet is new"):
        job.merge()
    pq.write_table(pa.table({"n": [1], "name": ["x"]}), folder / "a.parquet")
    (folder / "b.parquet").unlink()
    with pytest.raises(TerminalError, match=r"a\.parquet was replaced"):
        job.merge()
    assert job.sink.names() == []


@pytest.mark.parametrize("rows", [3, 20])
def test_input_that_changes_while_it_is_merged_leaves_no_manifest(job: Job, rows: int) -> None:
    job.answer_all()
    table = pa.Table.from_pylist([{"n": n, "name": "x"} for n in range(rows)], job.schema)
    pq.write_table(table, job.folder / "input" / "a.parquet")
    job.fingerprint = job.source().objects  # as if it had changed after the look at it
    with pytest.raises(TerminalError, match="changed while it was read"):
        job.merge()
    assert not job.sink.exists(MANIFEST_FILE)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("jsonl", [False, True])
def test_an_empty_dataset_gives_one_empty_file(tmp_path: Path, form: str, jsonl: bool) -> None:
    job = Job(tmp_path / "job", [], jsonl=jsonl)
    manifest = job.merge(format=form, max_error_fraction=0.0)
    assert (manifest.rows, len(manifest.files)) == (0, 1)
    assert job.output(manifest) == []
    assert plain(manifest.files[0].name) == f"part-00000.{form}"


def test_bad_json_lines_are_output_rows_without_columns_of_their_own(tmp_path: Path) -> None:
    job = Job(tmp_path / "job", ["a", None, "b"], jsonl=True)
    (job.folder / "input" / "a.jsonl").write_bytes(b'{"n": 0, "name": "x"}\n\nbad\n{"n": 2, "name": "y"}')
    job.fingerprint = job.source().objects
    job.answer_all()
    output = job.output(job.merge(format="jsonl"))
    assert [(row.get("n"), row.get("name"), row["completion"]) for row in output] == [
        (0, "x", "answer a"), (None, None, None), (2, "y", "answer b")
    ]  # fmt: skip
    assert output[1]["error"] == {"code": "invalid_row", "message": "blank"}


def test_values_without_a_json_type_are_text_in_jsonl(job: Job) -> None:
    types = {"day": pa.date32(), "at": pa.timestamp("ns"), "amount": pa.decimal128(10, 2), "raw": pa.binary()}
    for name, (kind, text) in enumerate(zip(types.items(), ["2026-01-02", "2026-01-02", "1.50", "eA=="], strict=True)):
        folder = job.folder / str(name)
        one = Job(folder, ["a"])
        value = pa.array([b"x"]) if kind[0] == "raw" else pa.array([text]).cast(kind[1])
        one.schema = pa.schema([(kind[0], kind[1])])
        pq.write_table(pa.table([value], schema=one.schema), one.folder / "input" / "a.parquet")
        one.fingerprint = one.source().objects
        one.stage = one.write_staged()
        one.answer_all()
        (row,) = one.output(one.merge(format="jsonl"))
        assert row[kind[0]].startswith(text)


def test_many_rows_in_many_files_and_more_than_one_spill_partition(tmp_path: Path) -> None:
    rows = 40_000
    job = Job(tmp_path / "job", [n % 30_000 for n in range(rows)], part_rows=9_000)
    for first in range(29_000, -1, -1_000):
        job.add_results(*(answer(n) for n in range(first, first + 1_000)))
    manifest = job.merge(rows_per_file=1_500)
    assert len(manifest.files) == 27
    assert [row["completion"] for row in job.output(manifest)] == [f"answer {n % 30_000}" for n in range(rows)]
    assert manifest.completion_tokens == 2 * 30_000


@st.composite
def _cases(draw: st.DrawFn) -> tuple[list[int | None], list[list[tuple[int, bool]]], int, int]:
    """Requests of the rows, result parts as (request, is an error), rows per file, rows per staged part."""
    requests = draw(st.lists(st.none() | st.integers(0, 6), max_size=30))
    distinct = sorted({name for name in requests if name is not None})
    complete = draw(st.permutations([(name, draw(st.booleans())) for name in distinct]))
    copies = draw(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12))
    results = draw(st.permutations(complete + copies))
    cuts = sorted(draw(st.lists(st.integers(0, len(results)), max_size=4)))
    edges = [0, *cuts, len(results)]
    parts = [results[start:end] for start, end in itertools.pairwise(edges)]
    return requests, parts, draw(st.integers(1, 12)), draw(st.integers(1, 12))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=_cases(), jsonl=st.booleans())
def test_merge_equals_a_plain_join(case: tuple[Any, ...], jsonl: bool) -> None:
    requests, parts, rows_per_file, part_rows = case
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder) / "job", requests, part_rows=part_rows, jsonl=jsonl)
        best: dict[str | int, dict[str, Any]] = {}
        for number, part in enumerate(parts):
            rows = [engine_error(name) if failed else answer(name, f"part {number}") for name, failed in part]
            for (name, _), row in zip(part, rows, strict=True):
                if name not in best or (best[name]["error"] and not row["error"]):
                    best[name] = row
            if rows:
                job.add_results(*rows)
        manifest = job.merge(rows_per_file=rows_per_file, format="jsonl" if jsonl else "parquet")
        output = job.output(manifest)
        assert output == job.expected(best)
        assert all(file.rows == rows_per_file for file in manifest.files[:-1])
        assert manifest.error_rows == error_counts(output)
        taken = [best[name] for name in set(requests) if name is not None and not best[name]["error"]]
        assert manifest.completion_tokens == sum(row["completion_tokens"] for row in taken)


def test_samples_of_the_output_stand_in_the_work_folder(tmp_path: Path) -> None:
    job = Job(tmp_path, [None, "a", "b", None, "c", "a", "d", None, None, "e"])
    length = {"finish_reason": "length"}
    job.add_results(answer("a", **length), engine_error("b"), answer("c"), answer("d", "long " * 300))
    job.add_results(answer("e", **length))
    job.merge()
    samples = OutputSamples.model_validate_json(job.work.read_bytes(SAMPLES_FILE))
    assert samples.truncated_rows == 3, "a stands in two rows"
    assert [(one.row_id, one.text[:10]) for one in samples.answers] == [
        ("id-1", "answer a"), ("id-4", "answer c"), ("id-5", "answer a"),
    ]  # fmt: skip
    assert [one.row_id for one in samples.errors["engine_error"]] == ["id-2"]
    assert samples.errors["invalid_row"] == job.stage.error_examples["invalid_row"]
