"""Output files: a stream of tables cut into files of so many rows."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from batchllm_operators.columns.arrays import Int64s
from batchllm_operators.errors import TransientError
from batchllm_operators.formats import ROW_JSON, Source, Writer, format_named
from batchllm_operators.merge.claim import SinkClaim
from batchllm_operators.records import OutputFile
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.store import Store
from batchllm_operators.tasks.base import Task
from batchllm_operators.wording import counted
from batchllm_operators.work.results import output_fields


def carried_rows(
    source: Source, schema: pa.Schema, spec: SinkSpec, task: Task, rows: Int64s | None = None
) -> tuple[Iterator[pa.Table], pa.Schema]:
    """The input rows as the writer of the sink's format takes them, and the schema of its rows with their answers.

    Args:
        source: the input.
        schema: of the columns to carry, as staging found it.
        spec: of the sink.
        task: of the job.
        rows: numbers of the rows in the input, where the source has a filter.
    """
    answers = output_fields(task, spec.prefix)
    if format_named(spec.format).required_writer().takes == "json":
        return source.json_rows(schema, rows), pa.schema([ROW_JSON, *answers])
    return source.tables(schema, rows), pa.schema([*schema, *answers])


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
    form = format_named(spec.format)
    writer = form.required_writer()
    stream = _TableStream(tables)
    files: list[OutputFile] = []
    while not files or stream.has_more():
        claim.require()
        name = claim.file_name(len(files), form.suffixes[0].removeprefix("."))
        with sink.writer(name) as file:
            rows = writer.write(file, schema, stream.take(spec.rows_per_file))
            files.append(OutputFile(name=name, rows=rows, bytes=file.tell(), digest=file.digest()))
        _verify(files[-1], sink, writer)
    return files


def _verify(file: OutputFile, sink: Store, writer: Writer) -> None:
    stored = sink.object(file.name)
    if stored is None or stored.size != file.bytes:
        found = "nothing" if stored is None else counted(stored.size, "byte")
        raise TransientError(f"sink: wrote {counted(file.bytes, 'byte')}, found {found}", uri=sink.uri_of(file.name))
    if writer.counts_without_reading:
        rows = writer.count_rows(sink, file.name)
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
