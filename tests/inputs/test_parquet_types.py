"""Values that Arrow holds and Python or JSON do not: what prompts and both sinks make of them."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.store import Store
from tests.inputs.conftest import Carry

FAR = dt.datetime(9999, 12, 31)
NEAR = dt.datetime(2020, 1, 2, 3, 4, 5, 678901)


def written(folder: Path, table: pa.Table, name: str = "a", **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / f"{name}.parquet", **options)
    return folder


def template(text: str) -> dict[str, str]:
    return {"kind": "template", "template": text}


def times(values: list[int], unit: str, zone: str | None = None) -> pa.Array:
    return pa.array(values, pa.int64()).cast(pa.timestamp(unit, zone))


TWICE = pa.StructArray.from_arrays(
    [pa.array([1]), pa.array([2])], fields=[pa.field("a", pa.int64()), pa.field("a", pa.int64())]
)
VALUES: list[tuple[str, pa.Array, Any, str | None]] = [
    # name, column of one value, its JSON, and its text in a template (None: not looked at)
    ("nanoseconds", times([1_000_000_001], "ns"), "1970-01-01 00:00:01.000000001", "1970-01-01 00:00:01.000000001"),
    ("whole microseconds", times([1_000_000_000], "ns"), "1970-01-01 00:00:01.000000000", "1970-01-01 00:00:01"),
    ("year 9999", times([253402300799], "s"), "9999-12-31 23:59:59.000", "9999-12-31 23:59:59"),
    ("year 10000", times([253402300800], "s"), "10000-01-01 00:00:00.000", "10000-01-01 00:00:00.000"),
    ("year 146140", times([2**62], "us"), "148108-07-06 14:00:27.387904", "148108-07-06 14:00:27.387904"),
    ("before Christ", pa.array([-800_000], pa.int32()).cast(pa.date32()), "-0221-09-04", "-0221-09-04"),
    ("unknown zone", times([0], "us", "Nowhere/Else"), "1970-01-01 00:00:00.000000Z", "1970-01-01 00:00:00+00:00"),
    ("known zone", times([0], "us", "Europe/Berlin"), "1970-01-01 00:00:00.000000Z", "1970-01-01 01:00:00+01:00"),
    ("time of day", pa.array([5], pa.int64()).cast(pa.time64("ns")), "00:00:00.000000005", "00:00:00.000000005"),
    ("duration", pa.array([-1_500], pa.int64()).cast(pa.duration("ms")), "-PT1.5S", None),
    ("duration of nanoseconds", pa.array([1], pa.int64()).cast(pa.duration("ns")), "PT0.000000001S", "PT0.000000001S"),
    ("in a struct", pa.StructArray.from_arrays([times([1], "ns")], names=["t"]),
     {"t": "1970-01-01 00:00:00.000000001"}, None),
    ("decimal", pa.array(["12345678901234567890.10"]).cast(pa.decimal128(38, 2)), "12345678901234567890.10",
     "12345678901234567890.10"),
    ("not a number", pa.array([float("nan")]), "NaN", "nan"),
    ("infinite", pa.array([[float("inf"), -float("inf"), 1.5]]), ["Infinity", "-Infinity", 1.5], None),
    ("map of numbers", pa.array([[(1, "a"), (2, "b")]], pa.map_(pa.int64(), pa.string())), {"1": "a", "2": "b"}, None),
    ("map of days", pa.array([[(0, 1)]], pa.map_(pa.int32(), pa.int8())).cast(pa.map_(pa.date32(), pa.int8())),
     {"1970-01-01": 1}, None),
    ("struct with a field twice", TWICE, [["a", 1], ["a", 2]], None),
    ("binary", pa.array([b"\xff\x00"]), "/wA=", None),
    ("largest uint64", pa.array([2**64 - 1], pa.uint64()), 2**64 - 1, str(2**64 - 1)),
    ("text in binary", pa.array(["é".encode()]), "w6k=", "é"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "column", "as_json", "text"), VALUES, ids=[one[0] for one in VALUES])
def test_values_come_back_in_both_sinks_and_stand_in_prompts(
    carry: Carry, tmp_path: Path, tokenizer: Any, name: str, column: pa.Array, as_json: Any, text: str | None
) -> None:
    folder = written(tmp_path / "in", pa.table({"value": column}))
    output = carry(folder, prompt=template("{{ value }}" if text is not None else "-"))
    assert output.errors == [None]
    assert output.rows[0]["value"] == as_json
    stored = pq.read_table(folder / "a.parquet")["value"]
    assert output.table["value"].cast(stored.type).to_string() == stored.to_string()
    if text is not None:
        assert output.tokens == [tokenizer(text)["input_ids"]]


def int96(folder: Path, values: list[Any], kind: pa.DataType, name: str = "a", column: str = "t") -> Path:
    return written(folder, pa.table({column: pa.array(values, kind)}), name, use_deprecated_int96_timestamps=True)


def test_timestamps_of_96_bits_keep_their_year_and_their_digits(carry: Carry, tmp_path: Path) -> None:
    output = carry(int96(tmp_path / "far-in", [FAR, NEAR, None], pa.timestamp("us")), name="far")
    assert output.column("t") == [
        [FAR, NEAR, None], ["9999-12-31 00:00:00.000000", "2020-01-02 03:04:05.678901", None],
    ]  # fmt: skip
    nested = int96(tmp_path / "nested-in", [[FAR], [], None], pa.list_(pa.timestamp("us")))
    assert carry(nested, name="nested").column("t")[0] == [[FAR], [], None]
    fine = int96(tmp_path / "fine-in", [1_577_934_245_678_901_234, -1], pa.timestamp("ns"))
    assert [row["t"] for row in carry(fine, name="fine").rows] == [
        "2020-01-02 03:04:05.678901234", "1969-12-31 23:59:59.999999999",
    ]  # fmt: skip


def test_far_years_beside_nanoseconds_of_96_bits_are_refused_until_the_job_names_a_type(
    carry: Carry, tmp_path: Path
) -> None:
    folder = int96(tmp_path / "in", [FAR], pa.timestamp("us"), "a")
    int96(folder, [1_577_934_245_678_901_234], pa.timestamp("ns"), "b")
    with pytest.raises(
        TerminalError, match=r"'t' has timestamps of 96 bits with nanoseconds, beside a year .*'t' in a"
    ):
        carry(folder)
    output = carry(folder, name="pinned", schema={"t": "timestamp[us]"})
    assert output.column("t")[0] == [FAR, NEAR.replace(microsecond=678901)]


def test_each_column_of_96_bits_has_the_unit_that_its_own_values_need(carry: Carry, tmp_path: Path) -> None:
    columns = {
        "far": pa.array([FAR, None], pa.timestamp("us")),
        "n": pa.array([1, 2]),
        "fine": pa.array([1_577_934_245_678_901_234, -1], pa.timestamp("ns")),
    }
    folder = written(tmp_path / "in", pa.table(columns), use_deprecated_int96_timestamps=True)
    output = carry(folder, prompt=template("{{ n }} {{ fine }}"))
    assert output.table["far"].to_pylist() == [FAR, None]
    assert [row["fine"] for row in output.rows] == ["2020-01-02 03:04:05.678901234", "1969-12-31 23:59:59.999999999"]


@pytest.mark.parametrize("pinned", [None, {"t": "timestamp[ns]"}])
def test_a_year_beyond_nanoseconds_is_refused_where_the_column_has_nanoseconds(
    carry: Carry, tmp_path: Path, pinned: dict[str, str] | None
) -> None:
    folder = int96(tmp_path / "in", [FAR], pa.timestamp("us"), "a")
    written(folder, pa.table({"t": pa.array([1], pa.timestamp("ns"))}), "b")
    with pytest.raises(TerminalError, match="'t' has timestamps of 96 bits with nanoseconds, beside a year"):
        carry(folder, schema=pinned or {})


def test_a_column_of_96_bits_that_nobody_uses_is_not_read(
    carry: Carry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamps = {"a": pa.array([FAR], pa.timestamp("us")), "b": pa.array([1_577_934_245_678_901_234], pa.timestamp("ns"))}
    for name, values in stamps.items():
        table = pa.table({"t": values, "n": [1]})
        folder = written(tmp_path / "in", table, name, use_deprecated_int96_timestamps=True)
    scanned: list[str] = []
    scan = Store.scan_parquet

    def noting(store: Store, name: str, columns: list[str], *arguments: Any, **options: Any) -> Any:
        scanned.extend(columns)
        return scan(store, name, columns, *arguments, **options)

    monkeypatch.setattr(Store, "scan_parquet", noting)
    assert carry(folder, prompt=template("{{ n }}"), columns=["n"]).errors == [None, None]
    assert set(scanned) == {"n"}


def test_text_that_is_no_utf8_is_its_rows_error_and_survives(carry: Carry, tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\4\0\0\0\6\0\0\0"), pa.py_buffer(b"caf\xe9ok"))
    folder = written(tmp_path / "in", pa.table({"text": broken, "n": [1, 2]}))
    output = carry(folder, prompt={"kind": "column", "column": "text"})
    assert output.errors == ["column 'text': expected text in UTF-8, got byte 0xe9 at position 3", None]
    assert [row["text"] for row in output.rows] == ["caf\ufffd", "ok"]
    assert output.table["text"].cast(pa.binary()).to_pylist() == [b"caf\xe9", b"ok"]
    # A row whose prompt does not need the text has no error.
    assert carry(folder, name="carried").errors == [None, None]
    fields = {"kind": "fields", "question": "?", "columns": ["text", "n"]}
    assert carry(folder, name="fields", prompt=fields).errors == [
        "column 'text': expected text in UTF-8, got byte 0xe9 at position 3", None,
    ]  # fmt: skip


def test_text_in_binary_columns_is_text_in_prompts_and_bytes_in_the_sink(
    carry: Carry, tmp_path: Path, tokenizer: Any
) -> None:
    folder = written(tmp_path / "in", pa.table({"text": pa.array([b"yes", b"\xff"])}))
    output = carry(folder, prompt=template("{{ text }}"))
    assert output.tokens == [tokenizer("yes")["input_ids"], None]
    assert output.errors[1] == "column 'text': expected text in UTF-8, got byte 0xff at position 0"
    assert output.column("text") == [[b"yes", b"\xff"], ["eWVz", "/w=="]]


def test_text_in_one_object_and_bytes_in_another_is_text(carry: Carry, tmp_path: Path, tokenizer: Any) -> None:
    folder = written(tmp_path / "in", pa.table({"text": pa.array([b"yes", b"\xff"])}), "a")
    written(folder, pa.table({"text": ["no"]}), "b")
    output = carry(folder, prompt=template("{{ text }}"))
    assert output.tokens == [tokenizer("yes")["input_ids"], None, tokenizer("no")["input_ids"]]
    assert output.schema.field("text").type == pa.string()
    assert [row["text"] for row in output.rows] == ["yes", "\ufffd", "no"]
    assert output.table["text"].cast(pa.binary()).to_pylist() == [b"yes", b"\xff", b"no"]


def test_columns_of_one_name_are_in_nobodys_way_where_others_are_selected(carry: Carry, tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array(["x"])], names=["a", "a", "text"])
    folder = written(tmp_path / "in", table)
    for name, options in (("all", {}), ("prompt", {"columns": ["text"], "prompt": template("{{ a }}")})):
        with pytest.raises(TerminalError, match=r"more than one column 'a': select others with source\.columns"):
            carry(folder, name=name, **options)
    output = carry(folder, name="others", columns=["text"], prompt=template("{{ text }}"))
    assert output.column("text") == [["x"], ["x"]]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_no_column_need_be_carried_and_none_need_stand_in_the_prompt(carry: Carry, tmp_path: Path, form: str) -> None:
    folder = tmp_path / "in"
    if form == "parquet":
        written(folder, pa.table({"text": ["x"] * 2500}), row_group_size=700)
    else:
        folder.mkdir()
        (folder / "a.jsonl").write_bytes(b'{"text": "x"}\n' * 2500)
    output = carry(folder, form=form, columns=[], sink={"rows_per_file": 1000})
    assert (output.staged.rows, output.staged.requests) == (2500, 2500)
    assert output.table.num_rows == len(output.rows) == 2500
    assert output.table.column_names == list(output.rows[0])


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_prefix_makes_room_for_input_columns_named_like_output_columns(
    carry: Carry, tmp_path: Path, form: str
) -> None:
    folder = tmp_path / "in"
    if form == "parquet":
        written(folder, pa.table({"completion": ["mine"], "error": [5]}))
    else:
        folder.mkdir()
        (folder / "a.jsonl").write_bytes(b'{"completion": "mine", "error": 5}\n')
    with pytest.raises(TerminalError, match=r"completion, error; .* or set sink\.prefix"):
        carry(folder, form=form)
    output = carry(folder, name="prefixed", form=form, sink={"prefix": "llm_"})
    assert output.rows[0] | {"llm_error": None} == {
        "completion": "mine", "error": 5, "llm_completion": "yes", "llm_finish_reason": "stop", "llm_error": None,
        "llm_prompt_tokens": 1, "llm_cached_tokens": 0, "llm_completion_tokens": 1,
    }  # fmt: skip
    assert output.table.column_names == list(output.rows[0])


def test_names_of_any_letters_are_columns(carry: Carry, tmp_path: Path) -> None:
    table = pa.table({"a.b": [1], "a": pa.array([{"b": 2}]), "": [3], "p[0]": [4], "x`y": [5], "row": [6]})
    output = carry(written(tmp_path / "in", table))
    assert output.table.select(table.column_names).to_pylist() == table.to_pylist()
    assert {name: output.rows[0][name] for name in table.column_names} == table.to_pylist()[0]
