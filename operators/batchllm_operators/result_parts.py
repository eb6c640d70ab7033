"""Result parts, as every step reads them: whole and checked, or set aside."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import pyarrow as pa

from batchllm_operators.errors import DamagedObjectError
from batchllm_operators.quarantine import set_aside
from batchllm_operators.records import RESULT_SCHEMA, RESULTS_FOLDER
from batchllm_operators.store import Store

_LOGGER = logging.getLogger(__name__)


def read_result_parts(work: Store, columns: Sequence[str], *, others: bool = False) -> Iterator[tuple[str, pa.Table]]:
    """All readable result parts of a work folder, by name.

    Args:
        work: the work folder.
        columns: of `RESULT_SCHEMA`.
        others: it is another job's: its damaged parts are left where they are.
    """
    for name in work.names(RESULTS_FOLDER):
        table = read_result_part(work, name, columns, others=others)
        if table is not None:
            yield name, table


def read_result_part(work: Store, name: str, columns: Sequence[str], *, others: bool = False) -> pa.Table | None:
    """A result part, or None where it is damaged or nothing of ours: then it is set aside, and counts as not computed.

    All of it is read, whatever the columns, so that a part that one step counts is a part that every step can read.
    """
    try:
        return _read_twice(work, name).select(list(columns))
    except DamagedObjectError as error:
        if others:
            _LOGGER.warning("result part left out: %s", error)
        else:
            set_aside(work, name, error)
        return None


def _read_twice(work: Store, name: str) -> pa.Table:
    try:
        return checked_result_part(work, name)
    except DamagedObjectError:
        # A connection that breaks off can look like damage: only what looks so twice is set aside.
        return checked_result_part(work, name)


def checked_result_part(work: Store, name: str) -> pa.Table:
    """A result part, all columns of `RESULT_SCHEMA`.

    Raises:
        DamagedObjectError: it is not Parquet, its pages are not what their checksums say, it lacks a column, a column
            has another type, or a request key is null.
    """
    with work.parquet(name) as file:
        for field in RESULT_SCHEMA:
            place = file.schema_arrow.get_field_index(field.name)
            found = None if place < 0 else file.schema_arrow.field(place).type
            if found != field.type:
                expected = f"expected one column {field.name!r} of type {field.type}"
                raise DamagedObjectError(
                    f"not a result part: {expected}, found {found or 'none'}", uri=work.uri_of(name)
                )
        table = file.read(columns=RESULT_SCHEMA.names)
    if table["request_key"].null_count:
        raise DamagedObjectError("not a result part: a request key is null", uri=work.uri_of(name))
    return table
