"""Result parts, as every step reads them: whole and checked, or set aside."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Sequence
from uuid import uuid4

import pyarrow as pa

from batchllm_operators.digests import digest_of_bytes
from batchllm_operators.errors import DamagedObjectError
from batchllm_operators.quarantine import set_aside
from batchllm_operators.records import RESULT_SCHEMA, RESULTS_FOLDER
from batchllm_operators.store import Store, parquet_writer

_DIGEST_IN_NAME = re.compile(r"-([0-9a-f]{32})\.parquet$")
_LOGGER = logging.getLogger(__name__)


def encoded_part(table: pa.Table) -> tuple[str, bytes]:
    """A name that no other part has, and the content of the object.

    The digest of the content is a part of the name: checksums of Parquet pages leave out what stands between the pages,
    where a flipped bit can change numbers (5 of the 25,712 bits of a small part do).

    Args:
        table: of `RESULT_SCHEMA`.
    """
    content = io.BytesIO()
    with parquet_writer(content, table.schema) as writer:
        writer.write_table(table)
    return f"{RESULTS_FOLDER}/part-{uuid4().hex[:12]}-{digest_of_bytes(content.getvalue())}.parquet", content.getvalue()


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

    All of it is checked, whatever the columns, so that a part that one step counts is a part that every step can read.
    """
    try:
        return _read_twice(work, name, columns)
    except DamagedObjectError as error:
        if others:
            _LOGGER.warning("result part left out: %s", error)
        else:
            set_aside(work, name, error)
        return None


def _read_twice(work: Store, name: str, columns: Sequence[str]) -> pa.Table:
    try:
        return checked_result_part(work, name, columns)
    except DamagedObjectError:
        # A connection that breaks off can look like damage: only what looks so twice is set aside.
        return checked_result_part(work, name, columns)


def checked_result_part(work: Store, name: str, columns: Sequence[str] = tuple(RESULT_SCHEMA.names)) -> pa.Table:
    """The columns of a result part.

    Raises:
        DamagedObjectError: it is not what the digest in its name or the checksums of its pages say, it is not Parquet,
            it lacks a column, a column has another type, or a request key is null.
    """
    told = _DIGEST_IN_NAME.search(name)
    with work.parquet(name, digest=told and told[1]) as file:
        for field in RESULT_SCHEMA:
            place = file.schema_arrow.get_field_index(field.name)
            found = None if place < 0 else file.schema_arrow.field(place).type
            if found != field.type:
                expected = f"expected one column {field.name!r} of type {field.type}"
                raise DamagedObjectError(
                    f"not a result part: {expected}, found {found or 'none'}", uri=work.uri_of(name)
                )
        # Without a digest only decoding a column shows that its pages are whole.
        table = file.read(columns=list({"request_key", *columns}) if told else RESULT_SCHEMA.names)
    if table["request_key"].null_count:
        raise DamagedObjectError("not a result part: a request key is null", uri=work.uri_of(name))
    return table.select(list(columns))
