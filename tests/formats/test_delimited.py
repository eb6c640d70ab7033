"""CSV and TSV: quotes, line ends, types, and rows that are not as the first line says."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pytest
from hypothesis import given, settings

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import Source, format_named, open_source
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store


def opened(folder: Path, content: bytes | str, name: str = "rows.csv", form: str = "csv", **spec: Any) -> Source:
    data = content.encode() if isinstance(content, str) else content
    Store(str(folder)).write_bytes(name, data)
    return open_source(SourceSpec(uri=str(folder / name), format=form, **spec))


def rows(source: Source) -> list[Any]:
    """The rows; a fault in place of a row that has one."""
    found: list[Any] = []
    for batch in source.batches(source.columns):
        records, faults = batch.readable()
        found += [faults[place].message if place in faults else record for place, record in enumerate(records)]
    return found


def test_quotes_line_ends_and_blank_lines_are_as_spreadsheets_write_them(tmp_path: Path) -> None:
    source = opened(tmp_path, '\ufeffid,text\r\n1,"a ""quoted"", word"\r\n\r\n2,"two\r\nlines"\r\n3,plain')
    assert rows(source) == [
        {"id": "1", "text": 'a "quoted", word'},
        {"id": "2", "text": "two\r\nlines"},
        {"id": "3", "text": "plain"},
    ]


def test_tabs_stand_between_the_fields_of_tsv(tmp_path: Path) -> None:
    source = opened(tmp_path, 'id\ttext\n007\ta, b\n8\t"c\td"\n', "rows.tab", "tsv")
    assert rows(source) == [{"id": "007", "text": "a, b"}, {"id": "8", "text": "c\td"}]


def test_bad_rows_are_the_errors_of_their_rows_alone(tmp_path: Path) -> None:
    content = b'id,text\n1,one\n2\n3,three,more\n4,\xff\n5,"five"x\n6,six\n'
    first, short, long, undecodable, unquoted, last = rows(opened(tmp_path, content))
    assert (first["id"], last["text"]) == ("1", "six")
    assert short == "object rows.csv line 3: expected 2 fields, got 1"
    assert long == "object rows.csv line 4: expected 2 fields, got 3"
    assert undecodable == "object rows.csv line 5: invalid UTF-8"
    assert unquoted == "object rows.csv line 6: text behind a closing quote: quotes within a field must be doubled"


def test_line_ends_of_old_are_told(tmp_path: Path) -> None:
    with pytest.raises(TerminalError, match="lines must end in LF or CR LF"):
        opened(tmp_path, "id,text\r1,one\r")


def test_a_row_is_at_fault_whatever_columns_are_read(tmp_path: Path) -> None:
    source = opened(tmp_path, b"id,text,note\n1,one,\xff\n2,two,\n")
    (batch,) = source.batches(["text"])
    assert list(batch.readable()[1]) == [0]


def test_a_quote_that_ends_too_late_is_told_with_all_its_lines(tmp_path: Path) -> None:
    first, swallowed, last = rows(opened(tmp_path, 'id,text\n1,one\n2,"two\n3,three\n4,"four"\n5,five\n'))
    assert (first["id"], last["id"]) == ("1", "5")
    assert swallowed.startswith("object rows.csv line 3 to 5: ")


def test_long_fields_come_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchllm_operators.formats.delimited._BATCH_CHARACTERS", 1000)
    source = opened(tmp_path, "id,text\n" + "".join(f"{n},{'x' * 300_000}\n" for n in range(3)))
    assert [len(row["text"]) for row in rows(source)] == [300_000] * 3


def test_a_quote_that_is_not_closed_ends_the_job_rather_than_swallow_rows(tmp_path: Path) -> None:
    source = opened(tmp_path, 'id,text\n1,one\n2,"two\n3,three\n4,four\n')
    with pytest.raises(TerminalError, match=r"rows\.csv ends within a quoted field of the row that begins in line 3"):
        rows(source)


def test_empty_objects_in_a_folder_have_no_rows(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for name, content in {"a.csv": b"", "b.csv": b"id\n1\n", "c.csv": b"id\n", "d.csv.gz": b""}.items():
        store.write_bytes(name, content)
    assert rows(open_source(SourceSpec(uri=str(tmp_path), format="csv"))) == [{"id": "1"}]


def test_types_that_the_job_names_are_read_and_empty_fields_are_null_there(tmp_path: Path) -> None:
    source = opened(tmp_path, "id,score,text\n1,2.5,\n2,,x\n", schema={"id": "int64", "score": "float64"})
    assert rows(source) == [{"id": 1, "score": 2.5, "text": ""}, {"id": 2, "score": None, "text": "x"}]
    assert source.schema.field("id").type == pa.int64()


def test_a_value_of_another_type_is_the_error_of_its_row_whatever_columns_are_read(tmp_path: Path) -> None:
    content = "id,text\n1,one\ntwo,x\n99999999999999999999,y\n,z\n"
    source = opened(tmp_path, content, schema={"id": "int64"})
    first, word, long, last = rows(source)
    assert (first["id"], last["id"]) == (1, None)
    assert word == "object rows.csv line 3: column 'id': expected int64, got 'two'"
    assert long == "object rows.csv line 4: column 'id': expected int64, got '99999999999999999999'"
    (batch,) = source.batches(["text"])
    assert list(batch.readable()[1]) == [1, 2]
    (table,) = source.tables(source.schema)
    assert table["text"].to_pylist() == ["one", None, None, "z"]


def test_a_type_that_no_text_is_of_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TerminalError, match=r"source\.schema: column 'id' is string"):
        rows(opened(tmp_path, "id\n[1]\n", schema={"id": "list<int64>"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,,text\n1,2,3\n", "got a column without a name"),
        (b"id,text,id\n1,2,3\n", "got 'id' twice"),
        ("id,text\n1,é\n".encode("utf-16"), "text in UTF-16 or UTF-32: convert it to UTF-8"),
        (b"<html><body>503</body></html>", r"HTML or XML \(an error page\?\)"),
        (b"PAR1" + b"\0" * 20, "a Parquet object: set source.format to parquet"),
        (b"ARROW1\0\0" + b"\0" * 20, "an Arrow object: set source.format to arrow"),
        (gzip.compress(b"id\n1\n", mtime=0), "gzip data, and its name does not say so"),
        (b"\xe9t\xe9,text\n1,2\n", "no text in UTF-8: convert it"),
    ],
    ids=str,
)
def test_what_is_no_such_text_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(TerminalError, match=message):
        opened(tmp_path, content)


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_compressed_objects_are_read_and_damage_is_told(tmp_path: Path, ending: str, pack: Any) -> None:
    packed = pack(b"id,text\n" + b"".join(b"%d,a text of some length %d\n" % (n, n * n) for n in range(5000)))
    assert len(rows(opened(tmp_path, packed, f"rows.csv{ending}"))) == 5000
    with pytest.raises(TerminalError, match="damaged"):
        rows(opened(tmp_path, packed[: len(packed) // 2], f"cut.csv{ending}"))


def test_columns_that_only_some_objects_have_are_null_in_the_others(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("a.csv", b"id,text\n1,one\n")
    store.write_bytes("b.csv", b"text,note,id\ntwo,late,2\n")
    source = open_source(SourceSpec(uri=str(tmp_path), format="csv"))
    assert [row["note"] for row in rows(source)] == [None, "late"]
    assert [row["id"] for row in rows(source)] == ["1", "2"]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["csv", "tsv"]),
    st.lists(st.tuples(st.text(), st.text(min_size=1)), min_size=1, max_size=8),
)
def test_any_text_that_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, form: str, texts: list[tuple[str, str]]
) -> None:
    store = Store(str(tmp_path_factory.mktemp("texts")))
    table = pa.table({"a": [a for a, _ in texts], "b": [b for _, b in texts]})
    writer = format_named(form).required_writer()
    with store.writer(f"part.{form}") as file:
        assert writer.write(file, table.schema, iter([table])) == len(texts)
    assert writer.count_rows(store, f"part.{form}") == len(texts)
    source = open_source(SourceSpec(uri=store.uri, format=form))
    assert [(row["a"], row["b"]) for row in rows(source)] == texts


def test_values_that_are_no_text_stand_as_in_json(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    table = pa.table({"n": [1, None], "ok": [True, False], "list": [["a", 'b"'], []], "text": ["=1+1", ""]})
    with store.writer("part.csv") as file:
        format_named("csv").required_writer().write(file, table.schema, iter([table]))
    assert store.read_bytes("part.csv") == b'n,ok,list,text\n1,true,"[""a"",""b\\""""]",=1+1\n,false,[],\n'
