"""The folder that everything else works with: objects, and Parquet objects read and written in pieces."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchllm_operators.digests import digest_of_bytes
from batchllm_operators.errors import DamagedObjectError
from batchllm_operators.object_store import ObjectStore
from batchllm_operators.parquet_objects import matching_row_groups, parquet_writer, row_group_batches

_PARQUET = "Parquet object"
_WHOLE_OBJECT_BYTES = 16 << 20


class Store(ObjectStore):
    """A folder of an object store or of a local disk; see `ObjectStore` for arguments and errors."""

    def write_table(self, name: str, table: pa.Table) -> str:
        """Write a table as one Parquet object; returns its digest."""
        with self.writer(name) as file:
            with parquet_writer(file, table.schema) as writer:
                writer.write_table(table)
            return file.digest()

    @contextmanager
    def parquet(self, name: str, digest: str | None = None) -> Iterator[pq.ParquetFile]:
        """An object opened as Parquet; a damaged one raises `DamagedObjectError` with its name.

        Args:
            name: of the object.
            digest: that it must have, and then it is read whole; None: the checksums of its pages have to do.
        """
        with self._errors(name, _PARQUET), self._parquet_content(name, digest) as source:
            yield pq.ParquetFile(source, page_checksum_verification=True)

    def parquet_schema(self, name: str) -> tuple[pa.Schema, int]:
        """Schema and number of rows of a Parquet object, from its footer."""
        with self.parquet(name) as file:
            return file.schema_arrow, file.metadata.num_rows

    def scan_parquet(
        self,
        name: str,
        columns: Collection[str],
        batch_rows: int,
        *,
        int96_unit: str = "ns",
        row_groups: Collection[int] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """The rows of a Parquet object in order, as batches of at most `batch_rows`, read ahead by a few batches.

        Memory is bounded by the largest row group (small ones are read together). Timestamps of 96 bits are read in
        the given unit; those that it does not reach come out wrong. Only these row groups are read; None: all.
        """
        batches = row_group_batches(
            self._fs, self._path(name), list(columns), batch_rows, int96_unit=int96_unit, row_groups=row_groups
        )
        while True:
            # Not around the yield: a fault of the consumer is none of this object.
            with self._errors(name, _PARQUET):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def parquet_row_groups(self, name: str, condition: pc.Expression) -> list[int]:
        """Numbers of the row groups whose statistics do not rule out a condition over the columns."""
        with self._errors(name, _PARQUET):
            return matching_row_groups(self._fs, self._path(name), condition)

    def _parquet_content(self, name: str, digest: str | None) -> Any:
        if digest is not None:
            content = self.read_bytes(name)
            found = digest_of_bytes(content)
            if found != digest:
                raise DamagedObjectError(f"expected digest {digest}, found {found}", uri=self.uri_of(name))
            return pa.BufferReader(content)
        if self._local or self._fs.info(self._path(name))["size"] > _WHOLE_OBJECT_BYTES:
            return self._fs.open(self._path(name), "rb")
        return pa.BufferReader(self.read_bytes(name))  # one request, not one a column
