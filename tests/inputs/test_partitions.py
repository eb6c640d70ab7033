"""`source.partitioning: hive`: folders such as `dt=2026-11-01/` are columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import open_source
from batchllm_operators.specs.source import SourceSpec
from tests.inputs.conftest import Carry

FOLDERS = ["dt=2026-11-01/shop=7", "dt=2026-11-02/shop=7", "dt=2026-11-02/shop=12"]


def write(root: Path, form: str, folders: list[str] = FOLDERS, extra: dict[str, Any] | None = None) -> None:
    for number, folder in enumerate(folders):
        place = root / folder
        place.mkdir(parents=True, exist_ok=True)
        rows = [{"n": number * 10 + row, "text": "hello"} | (extra or {}) for row in range(2)]
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), place / "rows.parquet")
        else:
            (place / "rows.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


def opened(root: Path | str, form: str, **options: Any) -> Any:
    return open_source(SourceSpec.model_validate({"uri": str(root), "format": form, "partitioning": "hive", **options}))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_folders_are_columns_of_prompts_and_of_the_output(carry: Carry, tmp_path: Path, form: str) -> None:
    write(tmp_path / "in", form)
    output = carry(
        tmp_path / "in", form=form, partitioning="hive", prompt={"kind": "template", "template": "{{ dt }} {{ shop }}"}
    )
    days = ["2026-11-01"] * 2 + ["2026-11-02"] * 4
    assert output.column("dt") == [days, days]
    shops = [7, 7, 12, 12, 7, 7]
    assert output.column("shop") == [shops, shops]
    assert output.column("n") == [[0, 1, 20, 21, 10, 11]] * 2
    assert output.table.schema.field("shop").type == pa.int64()
    assert output.staged.errors == 0


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_folder_wins_over_a_column_of_its_name(carry: Carry, tmp_path: Path, form: str) -> None:
    write(tmp_path / "in", form, extra={"shop": 99})
    output = carry(tmp_path / "in", form=form, partitioning="hive")
    assert output.column("shop") == [[7, 7, 12, 12, 7, 7]] * 2


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_the_schema_names_the_type_of_a_folder(carry: Carry, tmp_path: Path, form: str) -> None:
    write(tmp_path / "in", form)
    output = carry(tmp_path / "in", form=form, partitioning="hive", schema={"dt": "date32", "shop": "string"})
    assert output.table.schema.field("dt").type == pa.date32()
    assert output.column("shop") == [["7", "7", "12", "12", "7", "7"]] * 2


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_objects_of_other_partitions_are_no_input(carry: Carry, tmp_path: Path, form: str) -> None:
    write(tmp_path / "in", form)
    (tmp_path / "in" / FOLDERS[0] / f"rows.{form}").write_bytes(b"this is not opened")
    spec = {"filter": "dt >= '2026-11-02' AND n < 21", "partitioning": "hive"}
    source = opened(tmp_path / "in", form, **spec)
    assert [one.path.partition("/rows")[0] for one in source.objects] == [FOLDERS[2], FOLDERS[1]]
    assert source.look_again() == source.objects
    output = carry(tmp_path / "in", form=form, **spec)
    assert output.column("n") == [[20, 10, 11]] * 2


def test_values_come_back_from_names_as_hive_writes_them(tmp_path: Path) -> None:
    write(tmp_path, "parquet", ["k=a%2Fb%3D1/m=01", "k=__HIVE_DEFAULT_PARTITION__/m=02"])
    source = opened(tmp_path, "parquet")
    table = pa.concat_tables(source.tables(source.schema))
    assert table["k"].to_pylist() == [None, None, "a/b=1", "a/b=1"]
    assert table["m"].to_pylist() == ["02", "02", "01", "01"]


def test_folders_of_the_uri_itself_count_too(tmp_path: Path) -> None:
    write(tmp_path, "parquet")
    source = opened(tmp_path / "dt=2026-11-02", "parquet")
    assert {row["dt"] for table in source.tables(source.schema) for row in table.to_pylist()} == {"2026-11-02"}


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "parquet", ["dt=1/a=2", "dt=1"])
    with pytest.raises(TerminalError, match="expected the same keys in the path of every object, got 'a' in dt=1/a=2/"):
        opened(tmp_path, "parquet")
    with pytest.raises(TerminalError, match=r"source\.filter: \"dt = '9'\" holds for no partition of 1 object"):
        opened(tmp_path / "dt=1" / "a=2", "parquet", filter="dt = '9'")
    with pytest.raises(TerminalError, match=r"source\.schema: partition column 'a': expected date32"):
        opened(tmp_path / "dt=1" / "a=2", "parquet", schema={"a": "date32"})
