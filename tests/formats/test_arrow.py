"""Arrow files and streams."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import open_source
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store

TABLE = pa.table(
    {
        "id": pa.array(range(2500), pa.int32()),
        "text": [f"text {n}" for n in range(2500)],
        "kind": pa.array([["a", "b"][n % 2] for n in range(2500)]).dictionary_encode(),
        "tags": [[str(n)] for n in range(2500)],
    }
)


def read(folder: Path) -> list[dict[str, object]]:
    source = open_source(SourceSpec(uri=str(folder), format="arrow"))
    return [row for batch in source.batches(source.columns) for row in batch.records()]


def test_files_streams_and_feather_are_read(tmp_path: Path) -> None:
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=700)
    with pa.OSFile(str(tmp_path / "b.arrows"), "wb") as file, pa.ipc.new_stream(file, TABLE.schema) as stream:
        stream.write_table(TABLE)
    pyarrow.feather.write_feather(TABLE, str(tmp_path / "c.feather"))
    assert read(tmp_path) == TABLE.to_pylist() * 3


def test_some_columns_alone_are_read_and_others_stay_where_they_are(tmp_path: Path) -> None:
    pyarrow.feather.write_feather(TABLE, str(tmp_path / "c.feather"))
    source = open_source(SourceSpec(uri=str(tmp_path), format="arrow", columns=["id"], limit=3))
    assert [row for table in source.tables(source.schema) for row in table.to_pylist()] == [
        {"id": 0}, {"id": 1}, {"id": 2},
    ]  # fmt: skip
    assert sum(len(table) for table in source.tables(pa.schema([]))) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ARROW1\0\0 and then nothing of the kind", "not a readable object"),
        (b"PAR1 and more of it that is no Parquet", "a Parquet object: set source.format to parquet"),
        (b"FEA1 and more of it that is old", "Feather's first version: convert it"),
        (b"id,text\n1,one\n", "is no Arrow file or stream"),
        (b"", "is no Arrow file or stream"),
    ],
    ids=str,
)
def test_other_content_and_damage_are_told(tmp_path: Path, content: bytes, message: str) -> None:
    Store(str(tmp_path)).write_bytes("a.arrow", content)
    with pytest.raises(TerminalError, match=message):
        read(tmp_path)


def test_a_stream_that_was_cut_off_and_two_in_one_object_are_refused(tmp_path: Path) -> None:
    content, ends = io.BytesIO(), []
    with pa.ipc.new_stream(content, TABLE.schema) as writer:
        for batch in TABLE.to_batches(max_chunksize=1000):
            writer.write_batch(batch)
            ends.append(content.tell())
    whole = content.getvalue()
    store = Store(str(tmp_path))
    store.write_bytes("a.arrows", whole)
    assert len(read(tmp_path)) == 2500
    for cut in (whole[: ends[1]], whole[: ends[0] + 100], whole[:-3]):
        store.write_bytes("a.arrows", cut)
        with pytest.raises(TerminalError, match=r"it was cut off|not a readable object"):
            read(tmp_path)
    store.write_bytes("a.arrows", whole + whole)
    with pytest.raises(TerminalError, match="behind the end of the stream"):
        read(tmp_path)


def test_columns_that_no_format_holds_are_refused_only_where_they_are_wanted(tmp_path: Path) -> None:
    union = pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["x", "y"])])
    months = pa.array([(1, 2, 3), None], pa.month_day_nano_interval())
    table = pa.table({"text": ["a", "b"], "u": union, "m": months, "deep": [[1], []]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(TerminalError, match=r"column 'u' is sparse_union.*source\.columns"):
        open_source(SourceSpec(uri=str(tmp_path), format="arrow"))
    with pytest.raises(TerminalError, match="column 'm' is month_day_nano_interval"):
        open_source(SourceSpec(uri=str(tmp_path), format="arrow", columns=["m"]))
    source = open_source(SourceSpec(uri=str(tmp_path), format="arrow", columns=["text", "deep"]))
    assert sum(len(batch) for batch in source.batches(["text"])) == 2


def test_a_file_that_was_cut_off_is_damaged(tmp_path: Path) -> None:
    pyarrow.feather.write_feather(TABLE, str(tmp_path / "c.feather"))
    content = (tmp_path / "c.feather").read_bytes()
    (tmp_path / "c.feather").write_bytes(content[: len(content) // 2])
    with pytest.raises(TerminalError, match="not a readable object"):
        read(tmp_path)
