"""A format as a package from outside adds it: tab-separated text below a line of column names, without quotes."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import IO, Any

import pyarrow as pa

from batchllm_operators.formats import FileFormat, ObjectColumns, ReadRows, TableReader, Writer, json_values
from batchllm_operators.store import Store


class TabbedReader(TableReader):
    def columns_of(self, store: Store, name: str) -> ObjectColumns:
        with store.reader(name) as file:
            return ObjectColumns(pa.schema([(column, pa.string()) for column in _fields(file.readline())]))

    def read(self, store: Store, name: str, columns: Sequence[str], batch_rows: int) -> Iterator[ReadRows]:
        with store.reader(name) as file:
            names = _fields(file.readline())
            lines = enumerate(file, start=2)
            while batch := list(islice(lines, batch_rows)):
                rows: list[dict[str, str]] = []
                faults = {}
                for offset, (number, line) in enumerate(batch):
                    values = _fields(line)
                    if len(values) != len(names):
                        faults[offset] = f"object {name} line {number}: {len(values)} fields, not {len(names)}"
                    rows.append({} if offset in faults else dict(zip(names, values, strict=True)))
                schema = pa.schema([(column, pa.string()) for column in columns])
                yield ReadRows(pa.RecordBatch.from_pylist(rows, schema), faults)


class TabbedWriter(Writer):
    def write(self, file: IO[bytes], schema: pa.Schema, tables: Iterator[pa.Table]) -> int:
        file.write(_line(schema.names))
        rows = 0
        for table in tables:
            file.write(b"".join(map(_line, zip(*map(json_values, table.columns), strict=True))))
            rows += len(table)
        return rows

    def count_rows(self, store: Store, name: str) -> int:
        with store.reader(name) as file:
            return sum(1 for _ in file) - 1


def _fields(line: bytes) -> list[str]:
    return line.decode(errors="replace").rstrip("\r\n").split("\t")


def _line(values: Iterable[Any]) -> bytes:
    texts = ["" if value is None else value if isinstance(value, str) else json.dumps(value) for value in values]
    return "\t".join(" ".join(text.split()) for text in texts).encode() + b"\n"


TABBED = FileFormat("tabbed", (".tabbed", ".tbd"), "tabbed text", reader=TabbedReader(), writer=TabbedWriter())
