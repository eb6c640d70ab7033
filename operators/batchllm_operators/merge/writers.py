"""Output files: a stream of tables cut into files of so many rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from batchllm_operators.columns.arrays import Int64s
from batchllm_operators.errors import TerminalError, TransientError
from batchllm_operators.formats import ROW_JSON, Source, Writer, format_named
from batchllm_operators.merge.claim import SinkClaim
from batchllm_operators.merge.folders import FolderSpill
from batchllm_operators.merge.joining import side_by_side
from batchllm_operators.records import OutputFile
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.store import Store
from batchllm_operators.tasks.base import Task
from batchllm_operators.wording import counted
from batchllm_operators.work.results import output_fields


@dataclass(frozen=True)
class OutputRows:
    """What goes to the writer of the sink's format.

    Attributes:
        carried: the input rows, in order: the columns in front of the answers.
        schema: of these and the answers.
        partition_places: where the columns stand that name folders.
        dropped_places: columns that name folders and do not stand in the files.
    """

    carried: Iterator[pa.Table]
    schema: pa.Schema
    partition_places: tuple[int, ...] = ()
    dropped_places: tuple[int, ...] = ()


def output_rows(source: Source, schema: pa.Schema, spec: SinkSpec, task: Task, rows: Int64s | None) -> OutputRows:
    """The input rows as the writer of the sink's format takes them, and the schema of its rows with their answers.

    Args:
        source: the input.
        schema: of the columns to carry, as staging found it.
        spec: of the sink.
        task: of the job.
        rows: numbers of the rows in the input, where the source has a filter.

    Raises:
        TerminalError: `sink.partition_by` names a column that the output does not have.
    """
    answers = output_fields(task, spec.prefix)
    names = [*schema.names, *(field.name for field in answers)]
    missing = [name for name in spec.partition_by if name not in names]
    if missing:
        raise TerminalError(
            f"sink.partition_by: no such output column: {', '.join(missing)}; columns: {', '.join(names)}"
        )
    if format_named(spec.format).required_writer().takes != "json":
        places = tuple(names.index(name) for name in spec.partition_by)
        return OutputRows(source.tables(schema, rows), pa.schema([*schema, *answers]), places, places)
    carried = source.json_rows(schema, rows)
    # A JSON object keeps all its members: columns that name folders stand beside it until the folders are known.
    beside = pa.schema([schema.field(name) for name in spec.partition_by if name in schema.names])
    if len(beside):
        keyed = pa.schema([ROW_JSON, *beside])
        carried = side_by_side(carried, source.tables(beside, rows), keyed, source.spec.uri)
    names = [*beside.names, *(field.name for field in answers)]
    places = tuple(1 + names.index(name) for name in spec.partition_by)
    return OutputRows(carried, pa.schema([ROW_JSON, *beside, *answers]), places, tuple(range(1, 1 + len(beside))))


def write_output(
    tables: Iterator[pa.Table], schema: pa.Schema, sink: Store, spec: SinkSpec, claim: SinkClaim, folder: str = ""
) -> list[OutputFile]:
    """Write files of at most `rows_per_file` rows each; without rows, one empty file.

    Args:
        tables: the output rows in order, all of one schema.
        schema: that schema; see `output_rows`.
        sink: the folder.
        spec: format and rows of a file.
        claim: names the files; it is looked at before each.
        folder: below the sink, with a slash behind it.

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
        name = folder + claim.file_name(len(files), form.suffixes[0].removeprefix("."))
        with sink.writer(name) as file:
            rows = writer.write(file, schema, stream.take(spec.rows_per_file))
            files.append(OutputFile(name=name, rows=rows, bytes=file.tell(), digest=file.digest()))
        _verify(files[-1], sink, writer)
    return files


def write_in_folders(
    tables: Iterator[pa.Table], output: OutputRows, sink: Store, spec: SinkSpec, claim: SinkClaim, local: Path
) -> list[OutputFile]:
    """Write files into folders by the values of `sink.partition_by`; without rows, none.

    Args:
        tables: the output rows in order.
        output: their schema, and which columns name folders.
        sink: the folder.
        spec: format and rows of a file, and the names of the columns.
        claim: names the files.
        local: folder for the rows until all have come.

    Raises:
        TerminalError: the values of a column do not name folders, or too many.
        LostClaimError: another run has claimed the sink.
        TransientError: the store holds another size or number of rows than was written.
    """
    spill = FolderSpill(local, output.schema, spec.partition_by, output.partition_places, output.dropped_places)
    for table in tables:
        spill.add(table)
    files: list[OutputFile] = []
    for folder, rows in spill.in_folders():
        files += write_output(rows, spill.schema, sink, spec, claim, folder)
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
