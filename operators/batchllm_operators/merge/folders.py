"""Output in folders such as `dt=2026-11-01/region=eu/`: rows are sorted by the values of columns, on the local disk."""

from __future__ import annotations

import datetime
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchllm_operators.columns.arrays import Int64s
from batchllm_operators.errors import TerminalError
from batchllm_operators.formats.partitions import HIVE_NULL

MOST_FOLDERS = 10_000
"""More folders than that are a mistake, such as a column of ids."""
_MOST_OPEN = 64
_COMPRESSED = pa.ipc.IpcWriteOptions(compression="zstd")


class FolderSpill:
    """Takes output rows and gives them back folder by folder, in each in their order.

    Args:
        folder: local folder for the spill files.
        schema: of the rows.
        names: columns whose values name the folders, outermost first, for names and messages.
        places: where these columns stand in the schema.
        dropped: places of the columns without which the rows come back.

    Raises:
        TerminalError: a column has a type whose values name no folder.
    """

    def __init__(
        self, folder: Path, schema: pa.Schema, names: Sequence[str], places: Sequence[int], dropped: Sequence[int]
    ) -> None:
        self._folder = folder
        self._schema = schema
        self._names = names
        self._places = places
        self._kept = [place for place in range(len(schema)) if place not in dropped]
        self._numbers = itertools.count()
        self._files: dict[str, list[Path]] = {}
        self._open: OrderedDict[str, tuple[Any, pa.RecordBatchStreamWriter]] = OrderedDict()
        for name, place in zip(names, places, strict=True):
            if not _names_folders(schema.field(place).type):
                raise TerminalError(
                    f"sink.partition_by: expected a column of text, integers, booleans or dates, {name!r} is"
                    f" {schema.field(place).type}"
                )

    @property
    def schema(self) -> pa.Schema:
        """Schema of the rows as they come back."""
        return pa.schema([self._schema.field(place) for place in self._kept])

    def add(self, table: pa.Table) -> None:
        """Take rows.

        Raises:
            TerminalError: the rows have more than `MOST_FOLDERS` folders.
        """
        folders, numbers = _folders(self._names, [table.column(place) for place in self._places])
        kept = table.select(self._kept)
        for number, name in enumerate(folders):
            self._writer(name).write_table(kept.take(np.flatnonzero(numbers == number)))

    def in_folders(self) -> Iterator[tuple[str, Iterator[pa.Table]]]:
        """Each folder by its name, sorted, with its rows; its files go when the next is asked for."""
        for name in list(self._open):
            self._close(name)
        for name, paths in sorted(self._files.items()):
            yield name, self._read(paths)
            for path in paths:
                path.unlink()

    def _read(self, paths: Sequence[Path]) -> Iterator[pa.Table]:
        for path in paths:
            with pa.OSFile(str(path), "rb") as file, pa.ipc.open_stream(file) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch], self.schema)

    def _writer(self, name: str) -> pa.RecordBatchStreamWriter:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name][1]
        if name not in self._files and len(self._files) == MOST_FOLDERS:
            raise TerminalError(
                f"sink.partition_by: the values of {', '.join(self._names)} name more than {MOST_FOLDERS:,} folders;"
                " name columns with fewer values"
            )
        if len(self._open) == _MOST_OPEN:
            self._close(next(iter(self._open)))
        paths = self._files.setdefault(name, [])
        paths.append(self._folder / f"rows-{next(self._numbers)}.arrow")
        file = pa.OSFile(str(paths[-1]), "wb")
        self._open[name] = (file, pa.ipc.new_stream(file, self.schema, options=_COMPRESSED))
        return self._open[name][1]

    def _close(self, name: str) -> None:
        file, writer = self._open.pop(name)
        writer.close()
        file.close()


def _folders(names: Sequence[str], columns: Sequence[pa.ChunkedArray]) -> tuple[list[str], Int64s]:
    """The folders that rows stand in, and for each row the number of its own."""
    texts = [""]
    numbers = np.zeros(len(columns[0]), np.int64)
    for name, column in zip(names, columns, strict=True):
        encoded = pc.dictionary_encode(column.combine_chunks(), null_encoding="encode")
        values = [_folder(name, value) for value in encoded.dictionary.to_pylist()]
        pairs = numbers * max(len(values), 1) + encoded.indices.to_numpy()
        used, numbers = np.unique(pairs, return_inverse=True)
        texts = [f"{texts[pair // len(values)]}{values[pair % len(values)]}/" for pair in used.tolist()]
    return texts, numbers


def _folder(name: str, value: Any) -> str:
    if value is None:
        text = HIVE_NULL
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, datetime.date):
        text = value.isoformat()
    else:
        text = quote(str(value), safe="")
    return f"{quote(name, safe='')}={text}"


def _names_folders(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean, pa.types.is_date)
    return any(test(kind) for test in tests)
