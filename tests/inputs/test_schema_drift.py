"""Parquet objects whose columns have other types: put together without a loss, or refused before any work."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm_operators.errors import TerminalError
from tests.inputs.conftest import Carry

US, NS = pa.timestamp("us"), pa.timestamp("ns")
DAY = dt.datetime(2020, 1, 1)


def two(folder: Path, one: pa.Array, other: pa.Array) -> Path:
    folder.mkdir()
    pq.write_table(pa.table({"n": one}), folder / "a.parquet")
    pq.write_table(pa.table({"n": other}), folder / "b.parquet")
    return folder


GOES: list[tuple[str, pa.Array, pa.Array, pa.DataType, list[Any]]] = [
    ("int32, int64", pa.array([1], pa.int32()), pa.array([2**60]), pa.int64(), [1, 2**60]),
    ("int64, double", pa.array([2**53]), pa.array([0.5]), pa.float64(), [2.0**53, 0.5]),
    ("int64, uint64", pa.array([-1]), pa.array([2**63 - 1], pa.uint64()), pa.int64(), [-1, 2**63 - 1]),
    ("two units", pa.array([DAY], US), pa.array([1], NS), NS, None),
    ("decimals", pa.array(["1.5"]).cast(pa.decimal128(3, 1)), pa.array(["2.25"]).cast(pa.decimal128(9, 2)),
     pa.decimal128(9, 2), None),
    ("nulls", pa.nulls(1), pa.array(["x"]), pa.string(), [None, "x"]),
    ("structs", pa.array([{"a": 1}]), pa.array([{"b": "x", "a": 0.5}]),
     pa.struct([("a", pa.float64()), ("b", pa.string())]), [{"a": 1.0, "b": None}, {"a": 0.5, "b": "x"}]),
    ("lists", pa.array([[1]], pa.list_(pa.int8())), pa.array([[2, None]], pa.large_list(pa.int32())),
     pa.large_list(pa.int32()), [[1], [2, None]]),
    ("not a number", pa.array([{"a": float("nan"), "b": 1}]), pa.array([{"a": 1.0, "b": 0.5}]),
     pa.struct([("a", pa.float64()), ("b", pa.float64())]), None),
    ("encodings", pa.array(["x"]).dictionary_encode(), pa.array(["y"], pa.string_view()), pa.string(), ["x", "y"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "one", "other", "kind", "values"), GOES, ids=[case[0] for case in GOES])
@pytest.mark.parametrize("turned", [False, True])
def test_types_that_hold_all_values_go_together(
    carry: Carry,
    tmp_path: Path,
    name: str,
    one: pa.Array,
    other: pa.Array,
    kind: pa.DataType,
    values: Any,
    turned: bool,
) -> None:
    output = carry(two(tmp_path / "in", *((other, one) if turned else (one, other))))
    if not pa.types.is_struct(kind):
        assert output.schema.field("n").type == kind
    if values is not None:
        assert output.column("n")[0] == (values[::-1] if turned else values)


REFUSED: list[tuple[str, pa.Array, pa.Array, str, str, list[Any]]] = [
    ("digits beside double", pa.array([2**60 + 1]), pa.array([0.5]), "int64 .* double", "decimal128(38, 10)", None),
    ("digits beside double as text", pa.array([2**60 + 1]), pa.array([0.5]), "int64 .* double", "string",
     [str(2**60 + 1), "0.5"]),
    ("int64 and uint64", pa.array([-1]), pa.array([2**64 - 1], pa.uint64()), "uint64 .* int64", "decimal128(20, 0)",
     None),
    ("units that do not reach", pa.array([dt.datetime(9999, 1, 1)], US), pa.array([1], NS), r"timestamp\[us\].*\[ns\]",
     "string", None),
    ("decimal beside double", pa.array(["0.12345678901234567891"]).cast(pa.decimal128(38, 20)), pa.array([0.5]),
     "decimal128.* double", "string", ["0.12345678901234567891", "0.5"]),
    ("within lists", pa.array([[2**60 + 1]]), pa.array([[0.5]]), "list<.*int64> .*list<.*double>", "list<string>",
     [[str(2**60 + 1)], ["0.5"]]),
    ("text beside numbers", pa.array(["x"]), pa.array([1]), "string vs int64", "string", ["x", "1"]),
    ("zones", pa.array([DAY], pa.timestamp("us", "UTC")), pa.array([DAY], US), "tz=UTC.* vs timestamp", "string", None),
    ("booleans", pa.array([True]), pa.array([1]), "bool vs int64", "int64", [1, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "one", "other", "types", "pin", "values"), REFUSED, ids=[case[0] for case in REFUSED])
def test_types_that_lose_something_are_refused_in_staging_and_may_be_named(
    carry: Carry, tmp_path: Path, name: str, one: pa.Array, other: pa.Array, types: str, pin: str, values: Any
) -> None:
    folder = two(tmp_path / "in", one, other)
    with pytest.raises(TerminalError, match=types) as caught:
        carry(folder)
    message = str(caught.value)
    assert "a.parquet" in message
    assert "b.parquet" in message
    assert "name its type in source.schema, for example {n: string}" in message
    assert not (tmp_path / "job").exists()
    output = carry(folder, name="pinned", schema={"n": pin})
    assert str(output.schema.field("n").type).startswith(pin.partition("<")[0])
    assert values is None or output.column("n")[0] == values


def test_columns_that_disagree_are_in_nobodys_way_where_others_are_selected(carry: Carry, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"n": ["x"], "text": ["a"]}), folder / "a.parquet")
    pq.write_table(pa.table({"n": [1], "text": ["b"]}), folder / "b.parquet")
    prompt = {"kind": "column", "column": "text"}
    assert carry(folder, columns=["text"], prompt=prompt).column("text") == [["a", "b"], ["a", "b"]]
    with pytest.raises(TerminalError, match="string vs int64"):
        carry(folder, name="prompt", columns=["text"], prompt={"kind": "template", "template": "{{ n }}"})


def test_values_that_are_none_of_the_named_type_are_refused_in_staging(carry: Carry, tmp_path: Path) -> None:
    folder = two(tmp_path / "in", pa.array(["1", "two"]), pa.array([3]))
    with pytest.raises(TerminalError, match=r"source\.schema: column 'n' is string in this object, .* no int64: .*two"):
        carry(folder, schema={"n": "int64"})
    assert not (tmp_path / "job").exists()
    with pytest.raises(TerminalError, match=r"source\.schema: no such column: m; columns: n"):
        carry(folder, name="other", schema={"n": "string", "m": "int64"})


def test_a_named_type_decides_what_prompts_show(carry: Carry, tmp_path: Path) -> None:
    folder = two(tmp_path / "in", pa.array(["1.50"]), pa.array([3]))
    output = carry(folder, schema={"n": "decimal(10, 2)"}, prompt={"kind": "template", "template": "{{ n + 1 }}"})
    assert output.errors == [None, None]
    assert [row["n"] for row in output.rows] == ["1.50", "3.00"]
