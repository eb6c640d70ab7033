"""The format `parquet`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO

import pyarrow as pa

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats.base import FileFormat, Writer
from batchllm_operators.formats.content import COMPRESSIONS, foreign_content, is_markup
from batchllm_operators.formats.input_objects import FoundInput
from batchllm_operators.formats.object_rows import ReadRows
from batchllm_operators.formats.parquet_source import Footer, ParquetSource
from batchllm_operators.formats.source import Source
from batchllm_operators.formats.tables import TableReader
from batchllm_operators.parquet_objects import parquet_writer
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store

_MAGIC = b"PAR1"
_HEAD_BYTES = 16
_ROW_GROUP_ROWS = 16_384
_ROW_GROUP_BYTES = 64 << 20


class ParquetReader(TableReader):
    """Reads Parquet objects; the footer tells columns and rows."""

    def open(self, spec: SourceSpec, found: FoundInput) -> Source:
        """The rows of all objects."""
        return ParquetSource(spec, found, self)

    def columns_of(self, store: Store, name: str) -> Footer:
        """The footer of an object.

        Raises:
            TerminalError: damaged, or of another format: then it says of which, and what to do.
        """
        try:
            with store.parquet(name) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
                groups = tuple(file.metadata.row_group(place).num_rows for place in range(file.num_row_groups))
                leaf_columns = [file.schema.column(place) for place in range(len(file.schema.names))]
        except TerminalError as error:
            with store.reader(name) as content:
                what = _other_than_parquet(content.read(_HEAD_BYTES))
            if what is None:
                raise
            raise TerminalError(f"{error.message}; it is {what}", uri=error.uri) from error
        int96 = {leaf.path.split(".")[0] for leaf in leaf_columns if leaf.physical_type == "INT96"}
        # A name with a dot looks like a path; then the first piece is no column.
        in_96_bits = frozenset(name for name in schema.names if name in int96 or name.split(".")[0] in int96)
        return Footer(schema, rows, in_96_bits, groups)

    def read(self, store: Store, name: str, columns: Sequence[str], batch_rows: int) -> Iterator[ReadRows]:
        """The rows of an object, timestamps of 96 bits in nanoseconds."""
        return map(ReadRows, store.scan_parquet(name, columns, batch_rows))

    def recognises(self, head: bytes) -> bool:
        """Whether an object is Parquet, by its magic number."""
        return head.startswith(_MAGIC)


class ParquetWriter(Writer):
    """Writes Parquet files, in row groups that bound the memory of whoever reads them."""

    counts_without_reading = True

    def write(self, file: IO[bytes], schema: pa.Schema, tables: Iterator[pa.Table]) -> int:
        """Write one file; returns the number of rows."""
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

    def count_rows(self, store: Store, name: str) -> int:
        """The number of rows, from the footer."""
        return store.parquet_schema(name)[1]


def _other_than_parquet(head: bytes) -> str | None:
    """What an object that is no Parquet seems to be, by its first bytes, and what to do; None where nothing tells."""
    for kind, magic in COMPRESSIONS.values():
        if head.startswith(magic):
            return f"{kind} data: Parquet objects are compressed within, unpack it"
    return "HTML or XML (an error page?)" if is_markup(head) else foreign_content(head, "parquet")


PARQUET = FileFormat(
    name="parquet",
    suffixes=(".parquet", ".parq", ".pq"),
    content="a Parquet object",
    reader=ParquetReader(),
    writer=ParquetWriter(),
)
