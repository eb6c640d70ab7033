"""`source.filter`: only the rows for which a condition holds are input, whatever the format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm_flows import BatchJob
from batchllm_flows.job import InvalidJobError
from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import open_source
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store
from tests.inputs.conftest import Carry

ROWS = [{"n": n, "text": f"row {n}", "kind": ("a", "b", None)[n % 3]} for n in range(30)]


def write(folder: Path, form: str, rows: list[dict[str, Any]] = ROWS, **options: Any) -> None:
    """The rows as two objects; of Parquet with row groups of four rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("0", rows[: len(rows) // 2]), ("1", rows[len(rows) // 2 :])):
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(part), folder / f"{name}.parquet", row_group_size=4, **options)
        else:
            (folder / f"{name}.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in part))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("n >= 10 AND n < 13", [10, 11, 12]),
        ("kind = 'a' AND n > 20", [21, 24, 27]),
        ("NOT kind = 'a' AND n < 6", [1, 4]),
        ("kind IS NULL AND n BETWEEN 5 AND 11", [5, 8, 11]),
        ("text LIKE '%9'", [9, 19, 29]),
        ("n IN (3, 29) OR upper(kind) = 'B' AND n < 2", [1, 3, 29]),
        ("n > 1000", []),
    ],
)
def test_only_rows_for_which_the_condition_holds_are_input(
    carry: Carry, tmp_path: Path, form: str, condition: str, expected: list[int]
) -> None:
    write(tmp_path / "rows", form)
    output = carry(tmp_path / "rows", form=form, filter=condition)
    assert [row["n"] for row in output.rows] == expected
    assert output.staged.rows == len(expected)
    if expected or form == "parquet":  # JSON tells its columns by rows
        assert output.table["text"].to_pylist() == [f"row {n}" for n in expected]
    assert all(answer == "yes" for answer in output.table["completion"].to_pylist())


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_the_limit_counts_rows_that_the_filter_takes(carry: Carry, tmp_path: Path, form: str) -> None:
    write(tmp_path / "rows", form)
    output = carry(tmp_path / "rows", form=form, filter="kind = 'b'", limit=3)
    assert output.column("n") == [[1, 4, 7], [1, 4, 7]]


def test_rows_are_named_by_their_place_in_the_input(carry: Carry, tmp_path: Path) -> None:
    write(tmp_path / "rows", "parquet")
    output = carry(tmp_path / "rows", filter="n >= 27", prompt={"kind": "column", "column": "kind"})
    examples = output.staged.error_examples.values()
    assert [error.row_id for errors in examples for error in errors] == ["29"]


def test_columns_of_the_filter_are_not_carried_for_it(carry: Carry, tmp_path: Path) -> None:
    write(tmp_path / "rows", "parquet")
    output = carry(tmp_path / "rows", filter="n = 7", columns=["text"])
    assert output.table.column_names[:2] == ["text", "completion"]
    assert output.rows[0]["text"] == "row 7"
    assert "n" not in output.rows[0]


def test_a_row_that_cannot_be_read_stays_as_an_error(carry: Carry) -> None:
    lines = b'{"n":1}\n{"n":\n{"n":2}\n{"n":3}\n'
    output = carry({"rows.jsonl": lines}, form="jsonl", filter="n > 1")
    assert [(row.get("n"), row["error"] is not None) for row in output.rows] == [(None, True), (2, False), (3, False)]


def test_row_groups_without_a_row_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows", "parquet")
    read: list[int] = []
    scan = Store.scan_parquet

    def watched(store: Store, *args: Any, **options: Any) -> Any:
        for batch in scan(store, *args, **options):
            read.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(Store, "scan_parquet", watched)
    source = open_source(SourceSpec(uri=str(tmp_path / "rows"), format="parquet", filter="n = 5 OR n = 22"))
    batches = list(source.batches(["text"]))
    assert [number for batch in batches for number in batch.source_rows.tolist()] == [5, 22]  # type: ignore[union-attr]
    assert sum(read) == 8
    read.clear()
    numbers = pa.array([5, 22]).to_numpy()
    texts = [text for table in source.tables(pa.schema([("text", pa.string())]), numbers) for text in table["text"]]
    assert [text.as_py() for text in texts] == ["row 5", "row 22"]
    assert sum(read) == 8


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.one_of(st.none(), st.integers(-3, 3)), min_size=1, max_size=40),
    low=st.integers(-3, 3),
    high=st.integers(-3, 3),
    negated=st.booleans(),
)
def test_the_same_rows_are_read_again_as_tables_and_as_json(
    form: str, values: list[int | None], low: int, high: int, negated: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    write(folder, form, [{"i": i, "v": value} for i, value in enumerate([*values, 0])])
    condition = f"v BETWEEN {low} AND {high}"
    source = open_source(
        SourceSpec(uri=str(folder), format=form, filter=f"NOT ({condition})" if negated else condition)
    )
    numbers = [n for batch in source.batches(["i"]) for n in batch.source_rows.tolist()]  # type: ignore[union-attr]
    expected = [
        i for i, value in enumerate([*values, 0]) if value is not None and (low <= value <= high) is not negated
    ]
    assert numbers == expected
    rows = pa.array(numbers, pa.int64()).to_numpy()
    tables = source.tables(pa.schema([("i", pa.int64())]), rows)
    assert [i for table in tables for i in table["i"].to_pylist()] == expected
    texts = [text for table in source.json_rows(pa.schema([("i", pa.int64())]), rows) for text in table["row"]]
    assert [orjson.loads(text.as_py())["i"] for text in texts] == expected


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("n =", "source.filter: expected an SQL condition"),
        ("n = (SELECT 1)", "source.filter: '(SELECT 1)' is not understood here"),
        ("1 = 1", "source.filter: expected a condition over columns, got '1 = 1'"),
        ("(" * 5000 + "n = 1" + ")" * 5000, "source.filter: expected an SQL condition"),
        ("n > 99999999999999999999", "source.filter: the number 99999999999999999999 has more than 64 bits"),
    ],
)
def test_what_is_no_condition_is_no_job(condition: str, message: str, tmp_path: Path) -> None:
    job = {
        "source": {"uri": "in", "format": "jsonl", "filter": condition},
        "prompt": {"kind": "column", "column": "text"},
        "model": {"id": "m"},
        "sink": {"uri": "out"},
    }
    (tmp_path / "job.json").write_bytes(orjson.dumps(job))
    with pytest.raises(InvalidJobError) as told:
        BatchJob.from_file(tmp_path / "job.json")
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("form", "condition", "message"),
    [
        ("parquet", "nothing = 1", "source.filter: no such column: nothing; columns: n, text, kind"),
        ("jsonl", "nothing = 1", "source.filter: no such column: nothing; columns: n, text, kind"),
        ("parquet", "n = 'one'", "source.filter: expected a value of type int64, got 'one'"),
        ("parquet", "text = 1", "source.filter: 'text = 1' compares string with int64"),
        ("parquet", "n", "source.filter: Filter expression must evaluate to bool, but n evaluates to int64"),
    ],
)
def test_a_condition_that_does_not_go_with_the_columns_is_refused_before_rows_are_read(
    tmp_path: Path, form: str, condition: str, message: str
) -> None:
    write(tmp_path / "rows", form)
    with pytest.raises(TerminalError) as told:
        open_source(SourceSpec(uri=str(tmp_path / "rows"), format=form, filter=condition))
    assert message in str(told.value)


def test_json_values_of_other_types_are_told_with_their_rows_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"n": 1}\n{"n": "2"}\n')
    spec = {"uri": str(tmp_path), "format": "jsonl", "filter": "n > 1"}
    with pytest.raises(TerminalError, match=r"values of more than one type, in rows 0 to 1; `source\.schema` can name"):
        list(open_source(SourceSpec.model_validate(spec)).batches([]))
    typed = open_source(SourceSpec.model_validate({**spec, "schema": {"n": "int64"}}))
    assert [batch.source_rows.tolist() for batch in typed.batches([])] == [[1]]  # type: ignore[union-attr]
