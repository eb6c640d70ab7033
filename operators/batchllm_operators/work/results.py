"""`results/`: what engines answered, in immutable parts that every step reads alike: whole and checked, or not at all.

What counts as an answer is for the reader to say. Within a run an error is one: the request is not computed again, and
its rows get the error. The plan of a later run counts answers without an error only, so that the others are computed
again. Of several results of one request any is taken, one without an error first.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from uuid import uuid4

import pyarrow as pa

from batchllm_operators.digests import digest_of_bytes
from batchllm_operators.errors import DamagedObjectError
from batchllm_operators.store import Store, parquet_writer
from batchllm_operators.work.columns import ERROR_TYPE, KEY_TYPE, TOKENS_TYPE
from batchllm_operators.work.damage import leave_out
from batchllm_operators.work.layout import RESULTS_FOLDER

# One row per computed request, in order of completion. On an engine error the token columns are null.
RESULT_SCHEMA = pa.schema(
    [
        pa.field("request_key", KEY_TYPE, nullable=False),
        pa.field("output_token_ids", TOKENS_TYPE),
        pa.field("completion", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("cached_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("error", ERROR_TYPE),
    ]
)

COUNT_COLUMNS = ("request_key", "prompt_tokens", "cached_tokens", "completion_tokens", "error")
"""Which request it is, what it took, and whether it is answered."""

OUTPUT_FIELDS = [
    RESULT_SCHEMA.field(name)
    for name in ("completion", "finish_reason", "error", "prompt_tokens", "cached_tokens", "completion_tokens")
]
"""What merge adds to the input columns, under `sink.prefix`."""

_DIGEST_IN_NAME = re.compile(r"-([0-9a-f]{32})\.parquet$")


def output_fields(prefix: str) -> list[pa.Field]:
    """The output columns of a sink with this prefix of their names."""
    return [field.with_name(f"{prefix}{field.name}") for field in OUTPUT_FIELDS]


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


def part_names(work: Store) -> list[str]:
    """Names of all result parts of a work folder, sorted; what else stands among them turns out when it is read."""
    return work.names(RESULTS_FOLDER)


def read_result_parts(work: Store, columns: Sequence[str], *, only_looks: bool = False) -> Iterator[pa.Table]:
    """All readable result parts of a work folder, by name; arguments as `read_result_part`."""
    for name in part_names(work):
        table = read_result_part(work, name, columns, only_looks=only_looks)
        if table is not None:
            yield table


def read_result_part(work: Store, name: str, columns: Sequence[str], *, only_looks: bool = False) -> pa.Table | None:
    """A result part, or None where it is damaged or nothing of ours: then it counts as not computed.

    All of it is checked, whatever the columns, so that a part that one step counts is a part that every step can read.

    Args:
        work: the work folder.
        name: of the part.
        columns: of `RESULT_SCHEMA`.
        only_looks: a damaged part stays where it is; else it is set aside.
    """
    try:
        return _read_twice(work, name, columns)
    except DamagedObjectError as error:
        leave_out(work, name, error, only_looks=only_looks)
        return None


def _read_twice(work: Store, name: str, columns: Sequence[str]) -> pa.Table:
    try:
        return checked_result_part(work, name, columns)
    except DamagedObjectError:
        # A connection that breaks off can look like damage: only what looks so twice is damaged.
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
