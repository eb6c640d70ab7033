"""Objects that are something else than their name or the job says: one error that says what, not one a line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm_operators.errors import TerminalError
from tests.inputs.conftest import Carry

ROWS = b'{"n": 1}\n{"n": 2}\n'


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": [1]}), sink)
    return sink.getvalue().to_pybytes()


ZSTD = pa.compress(ROWS, "zstd", asbytes=True)
CASES: list[tuple[str, str, bytes, str]] = [
    ("array", "a.jsonl", b'[{"n": 1}, {"n": 2}]', r"is one JSON array, not JSON Lines: .*jq -c '\.\[\]'"),
    ("array over lines", "a.jsonl", b'[\n{"n": 1},\n{"n": 2}\n]\n', "is one JSON array"),
    ("array in a line and more", "a.jsonl", b'[{"n": 1},\n {"n": 2}]\n', "is one JSON array"),
    ("array in gzip", "a.jsonl.gz", gzip.compress(b'[{"n": 1}]'), r"a\.jsonl\.gz is one JSON array"),
    ("long array", "a.jsonl", b"[" + b'{"n": 1},' * 600_000 + b'{"n": 1}]', "is one JSON array"),
    ("pretty", "a.jsonl", b'{\n  "n": 1\n}\n{\n  "n": 2\n}\n', r"is JSON printed over several lines.*jq -c '\.'"),
    ("pretty from the brace on", "a.jsonl", b'{ "n": 1,\n  "m": 2 }\n', "is JSON printed over several lines"),
    ("UTF-16", "a.jsonl", ROWS.decode().encode("utf-16"), "is text in UTF-16 or UTF-32: convert it to UTF-8"),
    ("UTF-16 without mark", "a.jsonl", ROWS.decode().encode("utf-16-be"), "is text in UTF-16"),
    ("gzip", "a.jsonl", gzip.compress(ROWS), r"is gzip data, and its name does not say so: rename it to end in \.gz"),
    ("zstd", "a.ndjson", ZSTD, r"is zstd data, and its name does not say so: rename it to end in \.zst"),
    ("zstd as gzip", "a.jsonl.gz", ZSTD, "is zstd data, and its name says gzip: rename it"),
    ("plain as gzip", "a.jsonl.gz", ROWS, r"is plain text, and its name says gzip: rename it without \.gz"),
    ("Parquet", "a.jsonl", parquet(), "is a Parquet object: set source.format to parquet"),
    ("HTML", "a.jsonl", b"<!DOCTYPE html>\n<html>\n<body>403</body>\n</html>\n", r"is HTML or XML \(an error page\?\)"),
    ("XML", "a.jsonl", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is HTML or XML"),
    ("CSV", "a.jsonl", b"n,text\n1,x\n2,y\n", "is no JSON Lines: it begins with 'n,text'"),
    ("ZIP", "a.jsonl", b"PK\x03\x04" + bytes(40), "is a ZIP archive: unpack it"),
    ("truncated zstd", "a.jsonl.zst", ZSTD[:-4], r"a\.jsonl\.zst is damaged zstd data"),
    ("damaged bzip2", "a.jsonl.bz2", b"BZh9" + bytes(50), r"a\.jsonl\.bz2 is damaged bzip2 data"),
    ("truncated xz", "a.jsonl.xz", b"\xfd7zXZ\x00\x00\x04", r"a\.jsonl\.xz is damaged xz data"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "name", "content", "message"), CASES, ids=[case[0] for case in CASES])
def test_what_is_no_json_lines_is_said_once(
    carry: Carry, tmp_path: Path, case: str, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(TerminalError, match=message):
        carry({name: content}, form="jsonl")
    # It need not be the first object.
    with pytest.raises(TerminalError, match=message) as caught:
        carry({"0.jsonl": ROWS * 1000, f"b/{name}": content}, form="jsonl", name="second")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "job" / "results").exists()


OTHERS: list[tuple[str, bytes, str]] = [
    ("JSON Lines", ROWS, "not a readable Parquet object: .*; it is JSON text: set source.format to jsonl"),
    ("gzip", gzip.compress(parquet()), "it is gzip data"),
    ("HTML", b"<html></html>", "it is HTML or XML"),
    ("CSV", b"n\n1\n", "not a readable Parquet object"),
    ("nothing", b"", "not a readable Parquet object"),
]


@pytest.mark.parametrize(("case", "content", "message"), OTHERS, ids=[case[0] for case in OTHERS])
def test_what_is_no_parquet_is_said(carry: Carry, case: str, content: bytes, message: str) -> None:
    with pytest.raises(TerminalError, match=message):
        carry({"a.parquet": content})


ONE_BAD_ROW = [
    b'{"n": \n' + ROWS,
    b"[1]\n" + ROWS,
    b"<p>\n" + ROWS,
    b"{\n" + ROWS,
    b"n,text\n" + ROWS,
    b"\x00\n" + ROWS,
]


@pytest.mark.parametrize("content", ONE_BAD_ROW)
def test_a_bad_first_line_is_an_error_of_its_row_only(carry: Carry, content: bytes) -> None:
    output = carry({"a.jsonl": content}, form="jsonl")
    assert [error is None for error in output.errors] == [False, True, True]


def test_an_object_without_a_known_ending_is_read_as_what_it_is(carry: Carry, tmp_path: Path) -> None:
    for name, content in (("plain", ROWS), ("gz", gzip.compress(ROWS)), ("zst", ZSTD)):
        (tmp_path / name).write_bytes(content)
        output = carry(tmp_path / name, form="jsonl", name=f"{name}-job")
        assert [row["n"] for row in output.rows] == [1, 2]
