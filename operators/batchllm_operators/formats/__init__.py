"""File formats: what a job can read from and write to. Parquet and JSON Lines are built in.

To add one, see the contract in `base`: make a `FileFormat` of a reader, a writer, or both, and register it, by
`register_format` in the processes you start yourself, or by an entry point in the group `batchllm_flows.formats`, which
the command line and Prefect's workers find too.
"""

from __future__ import annotations

from collections.abc import Collection

from batchllm_operators.columns.arrow_values import json_values
from batchllm_operators.errors import TerminalError
from batchllm_operators.format_names import FORMATS
from batchllm_operators.formats.base import FileFormat, Reader, Writer
from batchllm_operators.formats.input_objects import FoundInput
from batchllm_operators.formats.object_rows import ObjectColumns, ReadRows
from batchllm_operators.formats.partitions import with_filtered_objects
from batchllm_operators.formats.source import BATCH_ROWS, ROW_JSON, RowBatch, Source
from batchllm_operators.formats.source_objects import source_objects
from batchllm_operators.formats.tables import ColumnarSource, TableReader
from batchllm_operators.records import InputObject
from batchllm_operators.specs.source import SourceSpec

__all__ = [
    "BATCH_ROWS",
    "ROW_JSON",
    "ColumnarSource",
    "FileFormat",
    "ObjectColumns",
    "ReadRows",
    "Reader",
    "RowBatch",
    "Source",
    "TableReader",
    "Writer",
    "find_objects",
    "format_named",
    "format_names",
    "formats_in_use",
    "json_values",
    "open_source",
    "register_format",
    "unregister_format",
]


def register_format(added: FileFormat) -> None:
    """Make a format known to this process; the same one twice is no error.

    Raises:
        TypeError: not a `FileFormat`.
        ValueError: another format has the name.
    """
    FORMATS.register(added)


def unregister_format(name: str) -> None:
    """Take back what `register_format` added.

    Raises:
        KeyError: it added no format of this name.
    """
    FORMATS.remove(name)


def format_names() -> list[str]:
    """Names of all formats that are built in, registered, or brought by an installed package; imports none of them."""
    return FORMATS.names()


def format_named(name: str) -> FileFormat:
    """The format of a name.

    Raises:
        TerminalError: no such format, or the package that brings it cannot be imported.
    """
    try:
        found: FileFormat = FORMATS.get(name)
    except ValueError as error:
        raise TerminalError(str(error)) from error
    return found


def formats_in_use() -> list[FileFormat]:
    """The formats that are built in, and those that were registered in this process or named by a job in it."""
    return FORMATS.in_use()


def find_objects(spec: SourceSpec) -> FoundInput:
    """Find the objects of a source, without a look at their columns.

    Raises:
        TerminalError: no object matches, no access, or those that match are of another format.
    """
    return with_filtered_objects(spec, source_objects(spec, format_named(spec.format)))


def open_source(
    spec: SourceSpec, found: FoundInput | None = None, only: Collection[InputObject] | None = None
) -> Source:
    """Find the objects of a source and look at their columns.

    Args:
        spec: of the source.
        found: its objects, where they are known.
        only: those of its objects that are taken; None: all.

    Raises:
        TerminalError: no object matches, no access, an object that cannot be read, objects whose schemas disagree, or
            that are of another format.
    """
    objects = find_objects(spec) if found is None else found
    if only is not None:
        objects = objects.only({one.path for one in only})
    source = format_named(spec.format).required_reader().open(spec, objects)
    source.check_filter()
    return source
