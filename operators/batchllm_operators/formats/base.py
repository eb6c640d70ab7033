"""The contract of a file format: what its objects are called, how their rows are read, and how rows are written.

A format is one `FileFormat`, registered under its name by `register_format` or by an entry point in the group
`batchllm_flows.formats` (see `batchllm_operators.registry`). Everything that depends on a format asks it: nothing else
compares names or endings.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Literal

import pyarrow as pa

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats.input_objects import FoundInput
from batchllm_operators.formats.source import Source
from batchllm_operators.records import InputObject
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SUFFIX = re.compile(r"(\.[a-z0-9]+)+")


class Reader(ABC):
    """Reads the objects of one format.

    Most formats implement the simpler `TableReader` (in `tables`). This one is for formats that need a `Source` of
    their own, such as JSON Lines, whose columns and types are known only when all rows are read.
    """

    @abstractmethod
    def open(self, spec: SourceSpec, found: FoundInput) -> Source:
        """The rows of all objects as one `Source`, whose docstrings say what it must give.

        Reads no more than is needed to tell the columns, where the format tells them without reading all rows.

        Args:
            spec: the source part of the job.
            found: the objects, in the order in which their rows count.

        Raises:
            TerminalError: an object is damaged, is of another format, or does not go together with the others.
            TransientError: the store does not answer.
        """

    def refusal(self, store: Store, one: InputObject) -> TerminalError | None:
        """Why an object with a name in `doubtful_suffixes` is not of this format, by its first bytes; None: it is."""
        del store, one
        return None

    def recognises(self, head: bytes) -> bool:
        """Whether an object that begins with these bytes (at least 16, if it has them) is surely of this format.

        Says so to users that asked for another format. Formats without a mark of their own recognise nothing.
        """
        del head
        return False


class Writer(ABC):
    """Writes output files of one format.

    Attributes:
        takes: `columns`: tables of the input's carried columns and of the answers; `json`: tables with the input row as
            one JSON object in their first column (`ROW_JSON`), and the answers behind it. Rows of JSON Lines then go
            out as they came in.
        counts_without_reading: whether `count_rows` needs no more than a look at the object (a footer). Then every file
            is counted after it was written; else only `batchllm verify` counts.
    """

    takes: Literal["columns", "json"] = "columns"
    counts_without_reading = False

    @abstractmethod
    def write(self, file: IO[bytes], schema: pa.Schema, tables: Iterator[pa.Table]) -> int:
        """Write one file, and leave it open; returns the number of rows.

        The file becomes visible in the sink whole and after this returns, with its size, rows and digest in the
        manifest; where this raises, nothing of it does. The same tables must always give rows in the same order.
        Memory must not grow with the file.

        Args:
            file: takes the bytes, in order; it is not seekable, and each `write` is hashed: few large ones are faster.
            schema: of the tables. Input columns are of any Arrow type; `json_values` makes plain values of them.
            tables: the rows, perhaps none: an output without rows has one file.

        Raises:
            TerminalError: values that the format cannot hold.
        """

    @abstractmethod
    def count_rows(self, store: Store, name: str) -> int:
        """The number of rows of a file that `write` wrote.

        Raises:
            DamagedObjectError: it is not readable as this format.
        """


@dataclass(frozen=True)
class FileFormat:
    """A file format.

    Attributes:
        name: as jobs name it: lower-case letters, digits, underscores.
        suffixes: endings of the names of its objects, in lower case and compared so; the first is that of our output.
        content: what an object of it is, in a message: `a Parquet object`.
        reader: reads it; None: it can be written only.
        writer: writes it; None: it can be read only.
        doubtful_suffixes: endings that objects of other content have as well: where a folder is listed,
            `reader.refusal` decides whether such an object is input.
    """

    name: str
    suffixes: tuple[str, ...]
    content: str
    reader: Reader | None = None
    writer: Writer | None = None
    doubtful_suffixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"format name: expected lower-case letters, digits and underscores, got {self.name!r}")
        if not self.suffixes:
            raise ValueError(f"format {self.name!r}: expected at least one suffix")
        for suffix in (*self.suffixes, *self.doubtful_suffixes):
            if not _SUFFIX.fullmatch(suffix):
                raise ValueError(f"format {self.name!r}: expected a suffix such as '.tsv' or '.tsv.gz', got {suffix!r}")

    def required_reader(self) -> Reader:
        """The reader.

        Raises:
            TerminalError: there is none.
        """
        if self.reader is None:
            raise TerminalError(f"source.format: format {self.name!r} cannot be read: it has no reader")
        return self.reader

    def required_writer(self) -> Writer:
        """The writer.

        Raises:
            TerminalError: there is none.
        """
        if self.writer is None:
            raise TerminalError(f"sink.format: format {self.name!r} cannot be written: it has no writer")
        return self.writer
