"""Rows from Parquet and JSON Lines objects, in order, good and bad."""

from __future__ import annotations

import datetime as dt
import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import BATCH_ROWS, Source, open_source
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store
from batchllm_operators.work.staged import carried_schema

from .conftest import Stage, json_lines


def opened(folder: Path, form: str, **source: Any) -> Source:
    return open_source(SourceSpec.model_validate({"uri": str(folder), "format": form, **source}))


def records(source: Source) -> list[dict[str, Any]]:
    return [record for batch in source.batches(source.columns) for record in batch.records()]


def test_rows_of_several_parquet_objects_come_in_order_of_path(tmp_path: Path) -> None:
    for name, first in (("b", 3000), ("a", 0)):
        pq.write_table(
            pa.table({"n": list(range(first, first + 3000))}), tmp_path / f"{name}.parquet", row_group_size=700
        )
    source = opened(tmp_path, "parquet")
    batches = list(source.batches(["n"]))
    assert [one.path for one in source.objects] == ["a.parquet", "b.parquet"]
    assert max(len(batch) for batch in batches) <= BATCH_ROWS
    assert [batch.first_row for batch in batches] == [batch.records()[0]["n"] for batch in batches]
    assert [record["n"] for batch in batches for record in batch.records()] == list(range(6000))


def test_parquet_schemas_are_unified_over_objects(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": pa.array([1], pa.int32()), "a": ["x"]}), tmp_path / "1.parquet")
    pq.write_table(
        pa.table({"n": pa.array([2], pa.int64()), "b": pa.array(["y"]).dictionary_encode()}), tmp_path / "2.parquet"
    )
    source = opened(tmp_path, "parquet")
    assert source.schema == pa.schema([("n", pa.int64()), ("a", pa.string()), ("b", pa.string())])
    assert records(source) == [{"n": 1, "a": "x", "b": None}, {"n": 2, "a": None, "b": "y"}]
    assert pa.concat_tables(source.tables(source.schema)).to_pylist() == records(source)


def test_parquet_schemas_that_do_not_go_together_name_the_object(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"n": ["x"]}), tmp_path / "2.parquet")
    with pytest.raises(TerminalError, match=r"does not go together .* int64 vs string") as caught:
        opened(tmp_path, "parquet")
    assert caught.value.uri == str(tmp_path / "2.parquet")


@pytest.mark.parametrize("keep", [0, 4, -20])
def test_an_unreadable_parquet_object_is_named(bucket: str, keep: int) -> None:
    store = Store(f"{bucket}/input")
    store.write_table("1.parquet", pa.table({"n": [1]}))
    store.write_bytes("2.parquet", store.read_bytes("1.parquet")[:keep])
    with pytest.raises(TerminalError, match="not a readable Parquet object") as caught:
        open_source(SourceSpec(uri=store.uri, format="parquet"))
    assert caught.value.uri == store.uri_of("2.parquet")


def test_a_source_without_objects_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TerminalError, match=r"source\.uri: no object matches"):
        opened(tmp_path, "parquet")


def test_selected_columns_that_do_not_exist_are_refused(stage: Stage) -> None:
    for rows in ([{"text": "x"}], json_lines({"text": "x"})):
        with pytest.raises(TerminalError, match=r"source\.columns: no such column: other; columns: text"):
            stage(rows, columns=["text", "other"])


def test_only_selected_columns_go_to_the_sink_but_the_prompt_may_use_others(stage: Stage) -> None:
    for work, rows in (("1", [{"a": 1, "text": "x", "b": 2}]), ("2", json_lines({"a": 1, "text": "x", "b": 2}))):
        staged = stage(rows, columns=["b", "a"], work=work)  # type: ignore[arg-type]
        assert carried_schema(staged.summary) == pa.schema([("b", pa.int64()), ("a", pa.int64())])
        assert staged.errors == [None]


@pytest.mark.parametrize("as_json", [False, True])
def test_an_input_column_named_like_an_output_column_is_refused(stage: Stage, tmp_path: Path, as_json: bool) -> None:
    row = {"text": "x", "error": "y", "completion": "z"}
    with pytest.raises(TerminalError, match="names of output columns: completion, error"):
        stage(json_lines(row) if as_json else [row])
    assert not (tmp_path / "work").exists()
    assert stage(json_lines(row) if as_json else [row], columns=["text"]).errors == [None]


def test_bad_json_lines_are_row_errors_with_their_line_number(stage: Stage) -> None:
    content = b'{"text": "one"}\n\n{"text": \n[1]\n   \n{"text": "\xff\xfe"}\r\n{"text": "last"}'
    staged = stage(content)
    assert staged.errors == [
        None,
        ("invalid_row", "object input.jsonl line 3: malformed JSON: unexpected end of data at column 10"),
        ("invalid_row", "object input.jsonl line 4: expected a JSON object, got list"),
        ("invalid_row", "object input.jsonl line 6: invalid UTF-8 at byte 10"),
        None,
    ]
    assert staged.summary.error_rows == {"invalid_row": 3}
    assert (staged.summary.rows, staged.summary.requests, staged.summary.errors) == (5, 2, 3)


def test_only_bad_json_lines_are_row_errors_too(stage: Stage) -> None:
    assert stage(b"{\n{\n").summary.error_rows == {"invalid_row": 2}


def test_a_byte_order_mark_is_no_fault(stage: Stage) -> None:
    assert stage(b'\xef\xbb\xbf{"text": "one"}\n').errors == [None]


def test_a_line_longer_than_what_is_read_at_once_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": "x" * (9 << 20)}, {"text": "y"}))
    assert [len(record["text"]) for record in records(opened(tmp_path, "jsonl"))] == [9 << 20, 1]


def test_gzip_json_lines_are_read(tmp_path: Path) -> None:
    rows = [{"n": n, "text": "x" * 100} for n in range(50_000)]
    members = gzip.compress(json_lines(*rows[:30_000])) + gzip.compress(json_lines(*rows[30_000:]))
    (tmp_path / "a.jsonl.gz").write_bytes(members)
    assert records(opened(tmp_path, "jsonl")) == rows


def test_damaged_gzip_names_the_object(tmp_path: Path) -> None:
    content = gzip.compress(json_lines(*({"n": n} for n in range(50_000))))
    for damaged in (content[:-1000], b"no gzip", content[:1000] + b"\0" * 100 + content[1100:]):
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        with pytest.raises(TerminalError, match=r"object a\.jsonl\.gz is damaged gzip data"):
            records(opened(tmp_path, "jsonl"))


def test_json_types_are_unified_over_all_rows(stage: Stage) -> None:
    rows: list[dict[str, Any]] = [{"text": "x", "n": 1, "m": 1, "o": None} for _ in range(BATCH_ROWS - 1)]
    rows += [
        {"text": "x", "n": 1.5, "m": 1, "o": None},
        {"text": "x", "n": 2, "m": "two", "o": {"a": 1}, "late": [1, None]},
        {"text": "x", "n": 2**60 + 1, "m": {"k": [1]}, "o": {"b": "x"}, "late": []},
        {"text": "x", "n": None, "m": True, "e": {}, "null": None, "big": 2**63},
    ]
    staged = stage(json_lines(*rows))
    schema = carried_schema(staged.summary)
    source = open_source(SourceSpec(uri=str(Path(staged.work.uri).parent / "input.jsonl"), format="jsonl"))
    tables = list(source.tables(schema))
    assert all(table.schema == schema for table in tables)
    assert dict(zip(schema.names, map(str, schema.types), strict=True)) == {
        "text": "string", "n": "extension<arrow.json>", "m": "extension<arrow.json>",
        "o": "struct<a: int64, b: string>", "late": "list<item: int64>", "e": "extension<arrow.json>", "null": "string",
        "big": "extension<arrow.json>",
    }  # fmt: skip
    assert pa.concat_tables(tables).to_pylist()[-4:] == [
        {"text": "x", "n": "1.5", "m": "1", "o": None, "late": None, "e": None, "null": None, "big": None},
        {"text": "x", "n": "2", "m": '"two"', "o": {"a": 1, "b": None}, "late": [1, None], "e": None, "null": None,
         "big": None},
        {"text": "x", "n": str(2**60 + 1), "m": '{"k":[1]}', "o": {"a": None, "b": "x"}, "late": [], "e": None,
         "null": None, "big": None},
        {"text": "x", "n": None, "m": "true", "o": None, "late": None, "e": "{}", "null": None, "big": str(2**63)},
    ]  # fmt: skip


def test_large_integers_within_structs_and_lists_keep_their_digits_also_beside_floats(stage: Stage) -> None:
    rows: list[dict[str, Any]] = [{"text": "x", "o": {"a": 1, "b": 1}, "l": [1], "f": 1} for _ in range(BATCH_ROWS)]
    rows += [{"text": "x", "o": {"a": 1.5, "b": 2}, "l": [0.5], "f": 1.5}]
    rows += [{"text": "x", "o": None, "l": [None]} for _ in range(BATCH_ROWS - 1)]
    rows += [{"text": "x", "o": {"a": 2**60 + 1, "b": 2**63 - 1}, "l": [2**60 + 1, None], "f": 2**53}]
    staged = stage(json_lines(*rows))
    source = open_source(SourceSpec(uri=str(Path(staged.work.uri).parent / "input.jsonl"), format="jsonl"))
    last = pa.concat_tables(source.tables(carried_schema(staged.summary))).slice(len(rows) - 1).to_pylist()
    objects = '{"a":1152921504606846977,"b":9223372036854775807}'
    assert last == [{"text": "x", "o": objects, "l": "[1152921504606846977,null]", "f": 2.0**53}]


def test_an_empty_dataset_has_no_rows(stage: Stage, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string()), "n": pa.array([], pa.int64())}), tmp_path / "e.parquet")
    staged = stage(tmp_path / "e.parquet")
    assert (staged.summary.rows, staged.summary.parts) == (0, ())
    assert carried_schema(staged.summary).names == ["text", "n"]
    staged = stage(b"", {"kind": "chat", "user": "{{ text }}"}, columns=["text"], work="json")
    assert (staged.summary.rows, staged.summary.parts) == (0, ())


def test_parquet_values_reach_the_template_as_python_values(stage: Stage, tokenizer: Any) -> None:
    row = {"day": dt.date(2026, 1, 2), "tags": ["a", "b"], "who": {"name": "Ada"}}
    prompt = {"kind": "template", "template": "{{ day.year }} {{ tags | join('+') }} {{ who.name }}"}
    (staged,) = stage([row], prompt).rows
    assert staged["prompt_token_ids"] == tokenizer("2026 a+b Ada")["input_ids"]


def test_tiny_row_groups_are_read_in_full_batches(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": list(range(5000))}), tmp_path / "a.parquet", row_group_size=3)
    batches = list(opened(tmp_path, "parquet").batches(["n"]))
    assert len(batches) == 5
    assert [record["n"] for batch in batches for record in batch.records()] == list(range(5000))
