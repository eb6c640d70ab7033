"""The formats `csv` and `tsv`: a line of column names, and text between commas or tabs, quoted as RFC 4180 says."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any

import orjson
import pyarrow as pa

from batchllm_operators.columns.arrow_values import json_values
from batchllm_operators.columns.column_types import converted
from batchllm_operators.errors import DamagedObjectError, TerminalError
from batchllm_operators.formats.base import FileFormat, Writer
from batchllm_operators.formats.content import COMPRESSIONS, foreign_content, is_markup
from batchllm_operators.formats.input_objects import FoundInput
from batchllm_operators.formats.object_rows import ObjectColumns, ReadRows, Wanted
from batchllm_operators.formats.source import BATCH_ROWS, Source
from batchllm_operators.formats.tables import ColumnarSource, TableReader
from batchllm_operators.formats.unpacking import lines_of, not_what_it_says, unpacked_chunks
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store

_CHUNK_BYTES = 1 << 20
_SNIFFED_BYTES = 64 << 10
_LONGEST_FIELD = 1 << 28
_BATCH_CHARACTERS = 1 << 26
_UNDECODABLE = "surrogateescape"
"""How bytes that are no UTF-8 are kept until it is known whose row they are in."""

csv.field_size_limit(_LONGEST_FIELD)  # of the whole process: by default 128 KiB, which documents exceed


@dataclass(frozen=True)
class Dialect:
    """How fields stand in a line."""

    name: str
    delimiter: str
    suffixes: tuple[str, ...]

    def rows_of(self, lines: Iterator[str]) -> Any:
        """A reader of Python's `csv`, which takes fields in quotes over several lines."""
        return csv.reader(lines, delimiter=self.delimiter, strict=True)


class DelimitedSource(ColumnarSource):
    """Rows of delimited text: all columns are text, but for those whose type `source.schema` names."""

    def __init__(self, spec: SourceSpec, found: FoundInput, reader: DelimitedReader) -> None:
        self._text = reader
        super().__init__(spec, found, reader)

    def _scan(self, path: str, fields: Sequence[pa.Field], wanted: Wanted | None = None) -> Iterator[ReadRows]:
        """The rows of an object; an empty field of a column that is no text is null.

        A row with a value that is not of the type that `source.schema` names is at fault, whatever columns are read.
        """
        del wanted
        other_than_text = {name: kind for name, kind in self._pinned.items() if not pa.types.is_string(kind)}
        return self._text.scan(self.store, path, [field.name for field in fields], BATCH_ROWS, other_than_text)


class DelimitedReader(TableReader):
    """Reads delimited text, plain or compressed; the first line names the columns."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    def open(self, spec: SourceSpec, found: FoundInput) -> Source:
        """The rows of all objects."""
        return DelimitedSource(spec, found, self)

    def columns_of(self, store: Store, name: str) -> ObjectColumns:
        """The columns that the first line names, all of text; an empty object has none, and no rows.

        Raises:
            TerminalError: a column without a name or with that of another, or another format.
        """
        with store.reader(name) as file:
            names = self._header(self._lines(file, name, _SNIFFED_BYTES), name)
        return ObjectColumns(pa.schema([(column, pa.string()) for column in names]))

    def read(self, store: Store, name: str, columns: Sequence[str], batch_rows: int) -> Iterator[ReadRows]:
        """The rows of an object; blank lines are none, and a row with more or fewer fields than columns is at fault."""
        return self.scan(store, name, columns, batch_rows, {})

    def scan(
        self, store: Store, name: str, columns: Sequence[str], batch_rows: int, types: Mapping[str, pa.DataType]
    ) -> Iterator[ReadRows]:
        """As `read`; fields of some columns must have values of a type, or be empty, which is null."""
        with store.reader(name) as file:
            lines = self._lines(file, name, _CHUNK_BYTES)
            names = self._header(lines, name)
            batch = _Batch(columns, names, types)
            rows = self._dialect.rows_of(lines)
            while True:
                first_line = lines.number + 1
                where = f"object {name} line {first_line}"
                try:
                    values = next(rows)
                except StopIteration:
                    break
                except csv.Error as error:
                    if lines.ended:
                        raise TerminalError(
                            f"source: object {name} ends within a quoted field of the row that begins in line"
                            f" {first_line}: a quote is not closed, or the object was cut off",
                            uri=store.uri_of(name),
                        ) from error
                    over = f" to {lines.number}" if lines.number > first_line else ""
                    batch.add_fault(f"{where}{over}: {_explained(error)}")
                else:
                    if values:  # else the line is blank
                        batch.add(values, where)
                if len(batch) >= batch_rows or batch.characters >= _BATCH_CHARACTERS:
                    yield batch.taken()
            if len(batch):
                yield batch.taken()

    def _header(self, lines: _Lines, name: str) -> list[str]:
        try:
            names: list[str] = next(filter(None, self._dialect.rows_of(lines)), [])
        except csv.Error as error:
            raise TerminalError(
                f"source: the first line of object {name} names no columns: {_explained(error)}"
            ) from error
        if any(map(_has_undecodable, names)):
            raise not_what_it_says(name, "no text in UTF-8: convert it")
        twice = sorted({column for column in names if names.count(column) > 1})
        if "" in names or twice:
            what = f"{twice[0]!r} twice" if twice else "a column without a name"
            raise TerminalError(
                f"source: expected a first line that names each column of object {name} once, got {what}"
            )
        return names

    def _lines(self, file: IO[bytes], name: str, chunk_bytes: int) -> _Lines:
        chunks = unpacked_chunks(
            file,
            name,
            chunk_bytes,
            plain_suffixes=self._dialect.suffixes,
            is_text=lambda head: bool(head) and not _is_binary(head),
        )
        first = next(chunks, b"")
        _refuse_other_content(first, name, self._dialect.name)
        return _Lines(first.removeprefix(codecs.BOM_UTF8), chunks)


class _Lines(Iterator[str]):
    """Lines with their ends, as Python's `csv` wants them.

    Attributes:
        number: of the last line that was given, from 1.
        ended: whether it was the last of all.
    """

    def __init__(self, first: bytes, chunks: Iterator[bytes]) -> None:
        self.number = 0
        self.ended = False
        self._lines = lines_of(chain([first], chunks))

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self.number += 1
        return f"{line.decode('utf-8', _UNDECODABLE)}\n"


class _Batch:
    """Rows that are collected until they are enough.

    Attributes:
        characters: in all fields of the rows.
    """

    def __init__(self, columns: Sequence[str], names: Sequence[str], types: Mapping[str, pa.DataType]) -> None:
        self._names = names
        self._places = [names.index(column) for column in columns]
        self._types = {names.index(column): kind for column, kind in types.items() if column in names}
        self._where: list[str] = []
        self._schema = pa.schema([(column, pa.string()) for column in columns])
        self._rows: list[list[str] | None] = []
        self._faults: dict[int, str] = {}
        self.characters = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, values: list[str], where: str) -> None:
        if len(values) != len(self._names):
            self.add_fault(f"{where}: expected {len(self._names)} fields, got {len(values)}")
        elif any(map(_has_undecodable, values)):  # also in columns that nobody asked for: a row is whole or none
            self.add_fault(f"{where}: invalid UTF-8")
        else:
            self._rows.append(values)
            self._where.append(where)
            self.characters += sum(map(len, values))

    def add_fault(self, message: str) -> None:
        self._faults[len(self._rows)] = message
        self._rows.append(None)
        self._where.append("")

    def taken(self) -> ReadRows:
        """The rows so far, which are forgotten."""
        for place, kind in self._types.items():
            self._refuse_other_values(place, kind)
        arrays = [self._column(place) for place in self._places]
        rows, faults = len(self._rows), self._faults
        self._rows, self._where, self._faults, self.characters = [], [], {}, 0
        if not arrays:
            return ReadRows(pa.RecordBatch.from_arrays([pa.nulls(rows)], names=[""]), faults)
        return ReadRows(pa.RecordBatch.from_arrays(arrays, schema=self._schema), faults)

    def _column(self, place: int) -> pa.Array:
        empty = "" if place in self._types else None
        texts = [None if row is None or row[place] == empty else row[place] for row in self._rows]
        return pa.array(texts, pa.string())

    def _refuse_other_values(self, place: int, kind: pa.DataType) -> None:
        """Let rows be at fault whose field there is of another type."""
        texts = self._column(place)
        if _converts(texts, kind):
            return
        for number, text in enumerate(texts):
            if text.is_valid and not _converts(texts.slice(number, 1), kind):
                self._rows[number] = None
                self._faults[number] = (
                    f"{self._where[number]}: column {self._names[place]!r}: expected {kind}, got {text.as_py()[:80]!r}"
                )


class DelimitedWriter(Writer):
    """Writes delimited text: null is an empty field, and values that are no text stand as in JSON."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    def write(self, file: IO[bytes], schema: pa.Schema, tables: Iterator[pa.Table]) -> int:
        """Write one file; returns the number of rows."""
        self._write_rows(file, [schema.names])
        rows = 0
        for table in tables:
            self._write_rows(file, zip(*(map(_field, json_values(column)) for column in table.columns), strict=True))
            rows += len(table)
        return rows

    def count_rows(self, store: Store, name: str) -> int:
        """The number of rows; reads the whole file."""
        with store.reader(name) as file:
            lines = _Lines(b"", iter(lambda: file.read(_CHUNK_BYTES), b""))
            try:
                return sum(1 for row in self._dialect.rows_of(lines) if row) - 1
            except csv.Error as error:
                raise DamagedObjectError(
                    f"not readable as {self._dialect.name}: {error}", uri=store.uri_of(name)
                ) from error

    def _write_rows(self, file: IO[bytes], rows: Any) -> None:
        text = io.StringIO(newline="")
        plain = csv.writer(text, delimiter=self._dialect.delimiter, lineterminator="\n")
        # Python's writer leaves a carriage return without quotes where lines end without one.
        quoting = csv.writer(text, delimiter=self._dialect.delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for row in rows:
            (quoting if any("\r" in field for field in row) else plain).writerow(row)
        file.write(text.getvalue().encode())  # at once: each write is hashed


def _explained(error: csv.Error) -> str:
    """What Python's `csv` complains of, in words for a user of the data."""
    said = str(error)
    if "new-line character" in said:
        return "a carriage return outside of quotes: lines must end in LF or CR LF"
    if "expected after" in said:
        return "text behind a closing quote: quotes within a field must be doubled"
    return said


def _converts(texts: pa.Array, kind: pa.DataType) -> bool:
    """Whether all texts are values of a type; True also for types that no text is one of, which are refused later."""
    try:
        converted(texts, kind)
    except pa.ArrowInvalid:
        return False
    except pa.ArrowException:
        return True
    return True


def _field(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _has_undecodable(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text)


def _is_binary(head: bytes) -> bool:
    return any(byte < 32 and byte not in b"\t\r\n\f" for byte in head)


def _refuse_other_content(first: bytes, name: str, asked: str) -> None:
    what = foreign_content(first, asked) if not first.startswith((b"{", b"[")) else None
    if what is not None:
        raise not_what_it_says(name, what)
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or first[1:2] == b"\0":
        raise not_what_it_says(name, "text in UTF-16 or UTF-32: convert it to UTF-8")
    if is_markup(first):
        raise not_what_it_says(name, "HTML or XML (an error page?)")


def _format(name: str, delimiter: str, endings: tuple[str, ...]) -> FileFormat:
    dialect = Dialect(name, delimiter, endings)
    return FileFormat(
        name=name,
        suffixes=tuple(f"{ending}{packed}" for ending in endings for packed in ("", *COMPRESSIONS)),
        content=f"{name.upper()} text",
        reader=DelimitedReader(dialect),
        writer=DelimitedWriter(dialect),
    )


CSV = _format("csv", ",", (".csv",))
TSV = _format("tsv", "\t", (".tsv", ".tab"))
