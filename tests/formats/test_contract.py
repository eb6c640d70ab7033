"""What holds for every format: those that are built in, and one from outside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import orjson
import pyarrow as pa
import pytest

from batchllm_operators.formats import ROW_JSON, FileFormat, format_named, format_names, open_source
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store

pytestmark = pytest.mark.usefixtures("tabbed")
FORMATS = ["parquet", "jsonl", "csv", "tsv", "arrow", "tabbed"]
ANSWER = pa.field("completion", pa.string())


def rows_for(form: FileFormat, texts: list[str]) -> tuple[pa.Schema, pa.Table]:
    """Input rows with a column `text`, as the writer of a format takes them, and answers beside them."""
    if form.required_writer().takes == "json":
        first = pa.array([orjson.dumps({"text": text}) for text in texts], ROW_JSON.type)
        schema = pa.schema([ROW_JSON, ANSWER])
    else:
        first = pa.array(texts, pa.string())
        schema = pa.schema([("text", pa.string()), ANSWER])
    answers = pa.array([f"answer to {text}" for text in texts], pa.string())
    return schema, pa.Table.from_arrays([first, answers], schema=schema)


def write(form: FileFormat, store: Store, texts: list[str], *, table_rows: int = 7) -> tuple[str, int]:
    """Write a file of a format in tables of a few rows; returns its name and the number of rows told."""
    schema, table = rows_for(form, texts)
    name = f"part-0{form.suffixes[0]}"
    with store.writer(name) as file:
        pieces = (table.slice(start, table_rows) for start in range(0, len(table), table_rows))
        rows = form.required_writer().write(file, schema, pieces)
        assert not file.closed
    return name, rows


def read(form: str, folder: str) -> Iterator[dict[str, object]]:
    source = open_source(SourceSpec(uri=folder, format=form))
    for batch in source.batches(["text", "completion"]):
        assert not batch.faults
        yield from batch.records()


def test_all_formats_are_meant() -> None:
    assert format_names() == FORMATS


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 7, 2500])
def test_what_is_written_is_counted_and_read_again_in_its_order(name: str, rows: int, tmp_path: Path) -> None:
    texts = [f"täxt {number}" for number in range(rows)]
    store, form = Store(str(tmp_path)), format_named(name)
    file, told = write(form, store, texts)
    assert (told, form.required_writer().count_rows(store, file)) == (rows, rows)
    assert list(read(name, store.uri)) == [{"text": text, "completion": f"answer to {text}"} for text in texts]


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_without_rows_is_a_file_of_the_format(name: str, tmp_path: Path) -> None:
    store, form = Store(str(tmp_path)), format_named(name)
    file, told = write(form, store, [])
    assert (told, form.required_writer().count_rows(store, file)) == (0, 0)
    assert list(read(name, store.uri)) == []


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_rows_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    first, second = Store(str(tmp_path / "first")), Store(str(tmp_path / "second"))
    texts = [f"text {number}" for number in range(30)]
    file, _ = write(format_named(name), first, texts)
    write(format_named(name), second, texts)
    assert first.read_bytes(file) == second.read_bytes(file)


@pytest.mark.parametrize("name", FORMATS)
def test_no_other_format_takes_its_objects_for_its_own(name: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    file, _ = write(format_named(name), store, ["text"])
    head = store.read_bytes(file)[:16]
    others = [format_named(other) for other in FORMATS if other != name]
    assert [other.name for other in others if other.reader and other.reader.recognises(head)] == []


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_the_same_each_time_and_a_limit_takes_the_first(name: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write(format_named(name), store, [f"text {number}" for number in range(1500)])
    source = open_source(SourceSpec(uri=store.uri, format=name, limit=1200))
    schema = pa.schema([("text", pa.string())])
    expected = [f"text {number}" for number in range(1200)]
    for _ in range(2):
        assert [row["text"] for batch in source.batches(["text"]) for row in batch.records()] == expected
        assert [text for table in source.tables(schema) for text in table["text"].to_pylist()] == expected
        texts = [text for table in source.json_rows(schema) for text in table["row"].to_pylist()]
        assert [orjson.loads(text)["text"] for text in texts] == expected
