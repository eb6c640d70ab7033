"""The format `arrow`: Arrow's files, which are Feather's second version, and streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats.base import FileFormat, Writer
from batchllm_operators.formats.content import foreign_content
from batchllm_operators.formats.object_rows import ObjectColumns, ReadRows
from batchllm_operators.formats.tables import TableReader
from batchllm_operators.formats.unpacking import not_what_it_says
from batchllm_operators.store import Store

_MAGIC = b"ARROW1"
_STREAM = b"\xff\xff\xff\xff"
"""How a stream begins: the mark before the length of its first message."""
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_HEAD_BYTES = 16
_COMPRESSION = "zstd"


class ArrowReader(TableReader):
    """Reads files and streams of record batches; a file's last bytes, or a stream's first, tell the columns."""

    def columns_of(self, store: Store, name: str) -> ObjectColumns:
        """The schema.

        Raises:
            TerminalError: damaged, or of another format: then it says of which, and what to do.
        """
        with _opened(store, name) as (schema, _):
            return ObjectColumns(schema)

    def read(self, store: Store, name: str, columns: Sequence[str], batch_rows: int) -> Iterator[ReadRows]:
        """The rows of an object; a batch of the object is held in memory whole."""
        del batch_rows
        with _opened(store, name) as (schema, batches):
            places = [schema.get_field_index(column) for column in columns]
            for batch in batches:
                arrays = [batch.column(place) for place in places]
                fields = [schema.field(place) for place in places]
                if not arrays:
                    arrays, fields = [pa.nulls(batch.num_rows)], [pa.field("", pa.null())]
                yield ReadRows(pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields)))

    def recognises(self, head: bytes) -> bool:
        """Whether an object is an Arrow file or stream, by its first bytes."""
        return head.startswith((_MAGIC, _STREAM))


class ArrowWriter(Writer):
    """Writes Arrow files, compressed; each table becomes record batches of its own."""

    def write(self, file: IO[bytes], schema: pa.Schema, tables: Iterator[pa.Table]) -> int:
        """Write one file; returns the number of rows."""
        rows = 0
        options = pa.ipc.IpcWriteOptions(compression=_COMPRESSION, unify_dictionaries=True)
        with pa.ipc.new_file(file, schema, options=options) as writer:
            for table in tables:
                writer.write_table(table)
                rows += len(table)
        return rows

    def count_rows(self, store: Store, name: str) -> int:
        """The number of rows of all batches."""
        with _opened(store, name) as (_, batches):
            return sum(batch.num_rows for batch in batches)


@contextmanager
def _opened(store: Store, name: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """The schema and the batches of an object."""
    with store.reader(name) as file:
        head = file.read(_HEAD_BYTES)
        file.seek(0)
        if head.startswith(_MAGIC):
            opened: Any = pa.ipc.open_file(file)
            yield opened.schema, (opened.get_batch(number) for number in range(opened.num_record_batches))
        elif head.startswith(_STREAM):
            stream: Any = pa.ipc.open_stream(file)
            yield stream.schema, _to_the_end(stream, file, store.uri_of(name))
        else:
            what = foreign_content(head, "arrow")
            if what is not None:
                raise not_what_it_says(name, what)
            raise TerminalError(f"source: object {name} is no Arrow file or stream", uri=store.uri_of(name))


def _to_the_end(stream: Any, file: IO[bytes], uri: str) -> Iterator[pa.RecordBatch]:
    """The batches of a stream, which must end as a whole one does: pyarrow takes one that was cut off for complete."""
    yield from stream
    end = file.tell()
    file.seek(max(end - len(_STREAM_END), 0))
    if file.read(len(_STREAM_END)) != _STREAM_END:
        raise TerminalError("source: the stream has no mark at its end: it was cut off; write it again", uri=uri)
    if file.read(1):
        raise TerminalError("source: bytes stand behind the end of the stream: write one stream an object", uri=uri)


ARROW = FileFormat(
    name="arrow",
    suffixes=(".arrow", ".feather", ".arrows", ".ipc"),
    content="an Arrow object",
    reader=ArrowReader(),
    writer=ArrowWriter(),
)
