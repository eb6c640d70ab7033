"""Output files: a stream of tables cut into files of so many rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

import orjson
import pyarrow as pa

from batchllm_operators.errors import TransientError
from batchllm_operators.merge.claim import SinkClaim
from batchllm_operators.records import OutputFile, output_fields
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.stage.arrow_values import json_values
from batchllm_operators.stage.readers import ROW_JSON, Source
from batchllm_operators.store import Store, parquet_writer
from batchllm_operators.wording import counted

_ROW_GROUP_ROWS = 16_384
_ROW_GROUP_BYTES = 64 << 20


def carried_rows(source: Source, schema: pa.Schema, spec: SinkSpec) -> tuple[Iterator[pa.Table], pa.Schema]:
    """The input rows as a sink of this format carries them, and the schema of its rows with their answers.

    Args:
        source: the input.
        schema: of the columns to carry, as staging found it.
        spec: of the sink. In JSON Lines a row is one column that holds the text of its JSON object: rows of a JSON
            Lines source are then written as they were read.
    """
    answers = output_fields(spec.prefix)
    if spec.format == "jsonl":
        return source.json_rows(schema), pa.schema([ROW_JSON, *answers])
    return source.tables(schema), pa.schema([*schema, *answers])


def write_output(
    tables: Iterator[pa.Table], schema: pa.Schema, sink: Store, spec: SinkSpec, claim: SinkClaim
) -> list[OutputFile]:
    """Write files of at most `rows_per_file` rows each; without rows, one empty file.

    Args:
        tables: the output rows in order, all of one schema.
        schema: that schema; see `carried_rows`.
        sink: the folder.
        spec: format and rows of a file.
        claim: names the files; it is looked at before each.

    Raises:
        LostClaimError: another run has claimed the sink.
        TransientError: the store holds another size or number of rows than was written.
    """
    write_file = _write_parquet if spec.format == "parquet" else _write_jsonl
    stream = _TableStream(tables)
    files: list[OutputFile] = []
    while not files or stream.has_more():
        claim.require()
        name = claim.file_name(len(files), spec.format)
        with sink.writer(name) as file:
            rows = write_file(file, schema, stream.take(spec.rows_per_file))
            files.append(OutputFile(name=name, rows=rows, bytes=file.tell(), digest=file.digest()))
        _verify(files[-1], sink)
    return files


def _verify(file: OutputFile, sink: Store) -> None:
    stored = sink.object(file.name)
    if stored is None or stored.size != file.bytes:
        found = "nothing" if stored is None else counted(stored.size, "byte")
        raise TransientError(f"sink: wrote {counted(file.bytes, 'byte')}, found {found}", uri=sink.uri_of(file.name))
    if file.name.endswith(".parquet"):
        _, rows = sink.parquet_schema(file.name)
        if rows != file.rows:
            raise TransientError(f"sink: wrote {counted(file.rows, 'row')}, found {rows:,}", uri=sink.uri_of(file.name))


class _TableStream:
    """Tables that can be taken by rows."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables = tables
        self._rest: pa.Table | None = None

    def has_more(self) -> bool:
        while self._rest is None or not len(self._rest):
            self._rest = next(self._tables, None)
            if self._rest is None:
                return False
        return True

    def take(self, rows: int) -> Iterator[pa.Table]:
        """The next so many rows, or those that are left."""
        while rows and self.has_more() and self._rest is not None:
            piece, self._rest = self._rest.slice(0, rows), self._rest.slice(rows)
            rows -= len(piece)
            yield piece


def _write_parquet(file: IO[bytes], schema: pa.Schema, tables: Iterator[pa.Table]) -> int:
    rows = waiting_rows = waiting_bytes = 0
    waiting: list[pa.Table] = []
    with parquet_writer(file, schema) as writer:
        for table in tables:
            rows += len(table)
            waiting.append(table)
            waiting_rows += len(table)
            waiting_bytes += table.nbytes
            if waiting_rows >= _ROW_GROUP_ROWS or waiting_bytes >= _ROW_GROUP_BYTES:
                writer.write_table(pa.concat_tables(waiting))
                waiting, waiting_rows, waiting_bytes = [], 0, 0
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    return rows


def _write_jsonl(file: IO[bytes], schema: pa.Schema, tables: Iterator[pa.Table]) -> int:
    names = schema.names[1:]
    rows = 0
    for table in tables:
        texts = table.column(0).cast(pa.large_binary()).to_pylist()
        answers = zip(*map(json_values, table.columns[1:]), strict=True)
        lines = []
        for text, answer in zip(texts, answers, strict=True):
            members = orjson.dumps(dict(zip(names, answer, strict=True)))
            # Both are objects in JSON: without the brace between them they are one.
            between = b"" if text[1:].strip() == b"}" else b","
            lines.append(b"%s%s%s\n" % (text.rstrip()[:-1].rstrip(), between, members[1:]))
        file.write(b"".join(lines))  # at once: each write is hashed
        rows += len(table)
    return rows
