"""Folders as people have them: everything that can be read is read, and the rest is named."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import open_source
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store
from tests.inputs.conftest import Carry


def rows(number: int) -> bytes:
    return b"".join(b'{"n":%d}\n' % n for n in range(number * 100, number * 100 + 100))


def packed(content: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


READ = {
    "0.jsonl": rows(0),
    "1.JSONL": rows(1),
    "2.ndjson": rows(2),
    "3.json": rows(3),
    "4.jsonl.gz": gzip.compress(rows(4)[:400]) + gzip.compress(rows(4)[400:]),
    "5.jsonl.bz2": bz2.compress(rows(5)[:400]) + bz2.compress(rows(5)[400:]),
    "6.jsonl.zst": packed(rows(6)[:400], "zstd") + packed(rows(6)[400:], "zstd"),
    "7.json.gz": gzip.compress(rows(7)),
    "8.jsonl.xz": lzma.compress(rows(8)),
    "9.NDJSON.LZ4": packed(rows(9), "lz4"),
}
NAMED = {
    "config.json": b'{\n  "a": 1\n}\n',
    "part-00000": rows(10),
    "rows.csv": b"n\n1\n",
    "rows.jsonl.br": b"?",
    "rows.parquet": b"PAR1",
}
SILENT = {"_SUCCESS": b"", ".0.jsonl.crc": b"x", "0.jsonl.crc": b"x", "_logs/0.jsonl": rows(11), ".git/x.jsonl": b"x"}


def test_a_folder_is_read_whole_or_what_is_left_out_is_named(carry: Carry) -> None:
    output = carry(READ | NAMED | SILENT, form="jsonl")
    assert [row["n"] for row in output.rows] == list(range(1000))
    staged = output.staged
    assert staged.left_out_objects == len(NAMED)
    assert sorted(one.split(" ")[0] for one in staged.left_out_examples) == sorted(NAMED)
    assert "config.json is JSON printed over several lines" in " ".join(staged.left_out_examples)
    told = staged.left_out_text()
    assert told.startswith("5 objects beside the input: ")
    assert not any(name in told for name in SILENT if name != "0.jsonl")
    assert staged.model_copy(update={"left_out_objects": 9}).left_out_text().endswith(" and 4 more")


def test_an_object_is_looked_into_once_while_it_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.jsonl").write_bytes(rows(0))
    (tmp_path / "settings.json").write_bytes(b'{\n  "a": 1\n}\n')
    (tmp_path / "1.json").write_bytes(b'{"text":"%s"}\n' % (b"x" * (1 << 20)))
    reads: list[tuple[str, int]] = []
    reader = Store.reader

    @contextmanager
    def noting(store: Store, name: str) -> Iterator[IO[bytes]]:
        with reader(store, name) as file:
            yield file
            reads.append((name, file.tell()))

    monkeypatch.setattr(Store, "reader", noting)
    source = open_source(SourceSpec(uri=str(tmp_path), format="jsonl"))
    assert dict(reversed(reads))["1.json"] < 256 << 10  # the first read; then its rows are read
    reads.clear()
    assert source.look_again() == source.objects
    assert not reads
    (tmp_path / "settings.json").write_bytes(rows(1))
    assert [one.path for one in source.look_again()] == ["0.jsonl", "1.json", "settings.json"]
    assert [name for name, _ in reads] == ["settings.json"]


def test_a_folder_of_parquet_names_what_else_is_there(carry: Carry, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.parquet", "b.PARQUET", "c.parq", "d.pq"):
        pq.write_table(pa.table({"name": [name]}), folder / name)
    for name in ("e.jsonl", "f.snappy", "_metadata", "_SUCCESS", ".a.parquet.crc"):
        (folder / name).write_bytes(b"{}")
    output = carry(folder)
    assert [row["name"] for row in output.rows] == ["a.parquet", "b.PARQUET", "c.parq", "d.pq"]
    assert output.staged.left_out_examples == ("e.jsonl (unknown ending)", "f.snappy (unknown ending)")


def test_nothing_is_left_out_of_what_the_user_spells_out(carry: Carry, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "part-00000").write_bytes(rows(0))
    (folder / "part-00001").write_bytes(gzip.compress(rows(1)))
    output = carry(folder / "part-*", form="jsonl")
    assert [row["n"] for row in output.rows] == list(range(200))
    assert output.staged.left_out_objects == 0


def test_a_folder_of_other_names_says_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"n\n1\n")
    with pytest.raises(TerminalError, match=r"no object matches \(expected names that end in .*\); there is rows\.csv"):
        open_source(SourceSpec(uri=str(tmp_path), format="jsonl"))
    (tmp_path / "rows.csv").unlink()
    (tmp_path / "rows.json").write_bytes(b'[{"n": 1}]')
    with pytest.raises(TerminalError, match=r"rows\.json is one JSON array"):
        open_source(SourceSpec(uri=str(tmp_path), format="jsonl"))


ODD = ["year=[2024]", "what?", "a*b", "[x", "deep [1]/*"]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_folders_and_objects_with_marks_of_globs_in_their_names(
    tmp_path: Path, name: str, place: str, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if place == "disk" else request.getfixturevalue("bucket")
    store = Store(root, StorageOptions())
    store.write_bytes(f"{name}/b.jsonl", rows(1))
    store.write_bytes(f"{name}/a[0].jsonl", rows(0))
    store.write_bytes("other/c.jsonl", rows(2))

    def found(uri: str) -> list[Any]:
        source = open_source(SourceSpec(uri=f"{root}/{uri}", format="jsonl"))
        return [record["n"] for batch in source.batches([]) for record in batch.records()]

    assert found(name) == found(f"{name}/") == found(f"{name}/*.jsonl") == list(range(200))
    assert found(f"{name}/a[0].jsonl") == list(range(100))
    assert found(f"{name}/[ab].jsonl") == list(range(100, 200))
    assert found("other/[a-c].json?") == list(range(200, 300))
