"""Partition columns: folders such as `dt=2026-11-01/region=eu/` in the paths of objects, as Hive writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa

from batchllm_operators.columns.arrow_values import json_values
from batchllm_operators.columns.sql_filter import SqlFilter, SqlFilterError
from batchllm_operators.errors import NoInputError, TerminalError
from batchllm_operators.formats.input_objects import FoundInput
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.wording import counted

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
"""What Hive, Spark and Arrow write for a null in the name of a folder."""


@dataclass(frozen=True)
class Partitions:
    """The partition columns of the objects of a source.

    Attributes:
        table: a row for each object, a column for each key; without columns where the source has none.
        paths: path of an object -> its row.
    """

    table: pa.Table
    paths: dict[str, int]

    @property
    def schema(self) -> pa.Schema:
        """The columns."""
        return self.table.schema

    def columns_of(self, path: str, rows: int) -> dict[str, pa.Array]:
        """The columns of an object's rows.

        Args:
            path: of the object.
            rows: how many.
        """
        row = self.paths[path]
        return {
            name: pa.repeat(self.table[name][row], rows)
            if self.table[name][row].is_valid
            else pa.nulls(rows, self.table[name].type)
            for name in self.table.column_names
        }

    def values_of(self, path: str) -> dict[str, Any]:
        """The values of an object, as values of JSON."""
        row = self.table.slice(self.paths[path], 1)
        return {name: next(iter(json_values(row[name]))) for name in row.column_names}


NO_PARTITIONS = Partitions(pa.table({}), {})


def partitions_of(spec: SourceSpec, found: FoundInput) -> Partitions:
    """The partition columns of a source: int64 where all values are integers, else text; as `source.schema` says.

    Args:
        spec: of the source.
        found: its objects.

    Raises:
        TerminalError: an object lacks a key that others have, or a value does not go with its type in `source.schema`.
    """
    if spec.partitioning == "none":
        return NO_PARTITIONS
    # Also of objects that the filter leaves out: it must not change the type of a column.
    paths = [one.path for one in found.unfiltered or found.objects]
    keys = [_keys_in(urlsplit(found.store.uri_of(path)).path) for path in paths]
    names = list(keys[0]) if keys else []
    for path, values in zip(paths, keys, strict=True):
        if different := set(names) ^ set(values):
            name = min(different)
            raise TerminalError(
                f"source.partitioning: expected the same keys in the path of every object, got {name!r} in"
                f" {paths[0] if name in names else path} and not in {path if name in names else paths[0]}",
                uri=found.store.uri_of(path),
            )
    pinned = spec.types()
    columns = {name: _column(name, [values[name] for values in keys], pinned.get(name)) for name in names}
    return Partitions(pa.table(columns), {path: row for row, path in enumerate(paths)})


def with_filtered_objects(spec: SourceSpec, found: FoundInput) -> FoundInput:
    """The objects whose partition columns do not rule out that `source.filter` takes a row of them.

    Raises:
        NoInputError: none is left.
        TerminalError: the condition does not go with the columns.
    """
    if spec.filter is None or spec.partitioning == "none":
        return found
    partitions = partitions_of(spec, found)
    taken = np.ones(len(found.objects), np.bool_)
    for part in SqlFilter(spec.filter).parts():
        if part.columns <= set(partitions.schema.names):
            try:
                taken &= part.holds(partitions.table)
            except SqlFilterError as error:
                raise TerminalError(f"source.filter: {error}", uri=spec.uri) from error
    objects = tuple(one for one, is_taken in zip(found.objects, taken, strict=True) if is_taken)
    if not objects:
        raise NoInputError(
            f"source.filter: {spec.filter!r} holds for no partition of {counted(len(found.objects), 'object')}",
            uri=spec.uri,
        )
    return replace(found, objects=objects, unfiltered=found.objects, again=partial(_filtered_again, spec, found.again))


def _filtered_again(spec: SourceSpec, again: Callable[[], FoundInput]) -> FoundInput:
    return with_filtered_objects(spec, again())


def _keys_in(path: str) -> dict[str, str | None]:
    """Key -> value of the folders of a path, null as None."""
    pairs = [folder.partition("=") for folder in path.split("/")[:-1] if "=" in folder]
    return {unquote(key): None if value == HIVE_NULL else unquote(value) for key, _, value in pairs if key}


def _column(name: str, values: list[str | None], pinned: pa.DataType | None) -> pa.Array:
    texts = pa.array(values, pa.string())
    if pinned is not None:
        try:
            return texts.cast(pinned)
        except pa.ArrowException as error:
            raise TerminalError(f"source.schema: partition column {name!r}: expected {pinned}: {error}") from error
    is_integers = all(value is None or _is_integer(value) for value in values)
    return texts.cast(pa.int64()) if is_integers and texts.null_count < len(texts) else texts


def _is_integer(text: str) -> bool:
    """Whether a text is an integer of 64 bits as one writes it: `01` is none, it would not come back as it was."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and str(int(text)) == text and -(2**63) <= int(text) < 2**63
