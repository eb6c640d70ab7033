"""`results/`: what engines answered, in immutable parts that every step reads alike: whole and checked, or not at all.

What counts as an answer is for the reader to say. Within a run an error is one: the request is not computed again, and
its rows get the error. The plan of a later run counts answers without an error only, so that the others are computed
again. Of several results of one request any is taken, one without an error first.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterator, Sequence
from uuid import uuid4

import pyarrow as pa

from batchllm_operators.digests import digest_of_bytes
from batchllm_operators.errors import DamagedObjectError, TerminalError
from batchllm_operators.parquet_objects import parquet_writer
from batchllm_operators.store import Store
from batchllm_operators.tasks.base import Answer, Task
from batchllm_operators.work.columns import ERROR_TYPE, KEY_TYPE
from batchllm_operators.work.damage import leave_out
from batchllm_operators.work.layout import RESULTS_FOLDER

COUNT_COLUMNS = ("request_key", "prompt_tokens", "cached_tokens", "completion_tokens", "error")
"""The columns that answers of all tasks have: which request it is, what it took, and whether it is answered."""


def result_schema(task: Task) -> pa.Schema:
    """The schema of the task's result parts: one row per computed request, in order of completion.

    Where a request has an error, all other columns but its key are null.
    """
    return pa.schema(
        [
            pa.field("request_key", KEY_TYPE, nullable=False),
            *task.answer_fields,
            pa.field("prompt_tokens", pa.int32()),
            pa.field("cached_tokens", pa.int32()),
            pa.field("completion_tokens", pa.int32()),
            pa.field("error", ERROR_TYPE),
        ]
    )


def answer_columns(task: Task) -> list[pa.Field]:
    """The columns that merge adds to those of the input, without the prefix of their names."""
    schema = result_schema(task)
    counts = ["prompt_tokens", "cached_tokens", *(["completion_tokens"] if task.generates else [])]
    return [schema.field(name) for name in (*task.output_names, "error", *counts)]


_DIGEST_IN_NAME = re.compile(r"-([0-9a-f]{32})\.parquet$")


def output_fields(task: Task, prefix: str) -> list[pa.Field]:
    """The output columns of a sink with this prefix of their names."""
    return [field.with_name(f"{prefix}{field.name}") for field in answer_columns(task)]


def refuse_output_names(task: Task, names: Sequence[str], prefix: str) -> None:
    """Refuse input columns that have names of output columns.

    Args:
        task: of the job.
        names: of the input columns that go to the sink.
        prefix: of the names of the output columns.

    Raises:
        TerminalError: names them, and the ways out.
    """
    taken = [field.name for field in output_fields(task, prefix) if field.name in names]
    if taken:
        raise TerminalError(
            f"source.columns: input columns have names of output columns: {', '.join(taken)};"
            " select the columns to carry to the sink without them, or set sink.prefix, for example to 'llm_'"
        )


def answers_table(task: Task, answers: Sequence[Answer]) -> pa.Table:
    """Answers as a table of `result_schema`, in their order.

    Raises:
        TerminalError: the values of an answer are not those of the task's `answer_fields`.
    """
    errors = [one.error and {"code": one.error.code.value, "message": one.error.message} for one in answers]
    nothing = (None,) * len(task.answer_fields)
    values = zip(*(nothing if one.values is None else one.values for one in answers), strict=True)
    schema = result_schema(task)
    try:
        columns = [
            [one.request_key for one in answers],
            *(values if answers else [[]] * len(task.answer_fields)),
            [one.prompt_tokens for one in answers],
            [one.cached_tokens for one in answers],
            [one.completion_tokens for one in answers],
            errors,
        ]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    except (TypeError, ValueError) as error:
        expected = ", ".join(f"{field.name}: {field.type}" for field in task.answer_fields)
        raise TerminalError(f"task {task.name!r}: expected answers of {expected}, got others: {error}") from error
    return pa.table(arrays, schema=schema)


def encoded_part(table: pa.Table) -> tuple[str, bytes]:
    """A name that no other part has, and the content of the object.

    The digest of the content is a part of the name: checksums of Parquet pages leave out what stands between the pages,
    where a flipped bit can change numbers (5 of the 25,712 bits of a small part do).

    Args:
        table: of `result_schema`.
    """
    content = io.BytesIO()
    with parquet_writer(content, table.schema) as writer:
        writer.write_table(table)
    return f"{RESULTS_FOLDER}/part-{uuid4().hex[:12]}-{digest_of_bytes(content.getvalue())}.parquet", content.getvalue()


def part_names(work: Store, known: Collection[str] = ()) -> list[str]:
    """Names of all result parts of a work folder, sorted; what else stands among them turns out when it is read.

    Args:
        work: the work folder.
        known: parts that were written; a store whose listings lag behind is asked for each that it does not list.
    """
    listed = set(work.names(RESULTS_FOLDER))
    return sorted(listed | {name for name in known if name not in listed and work.exists(name)})


def read_result_parts(
    work: Store, task: Task, columns: Sequence[str], *, only_looks: bool = False
) -> Iterator[pa.Table]:
    """All readable result parts of a work folder, by name; arguments as `read_result_part`."""
    for name in part_names(work):
        table = read_result_part(work, name, task, columns, only_looks=only_looks)
        if table is not None:
            yield table


def read_result_part(
    work: Store, name: str, task: Task, columns: Sequence[str], *, only_looks: bool = False
) -> pa.Table | None:
    """A result part, or None where it is damaged or nothing of ours: then it counts as not computed.

    All of it is checked, whatever the columns, so that a part that one step counts is a part that every step can read.

    Args:
        work: the work folder.
        name: of the part.
        task: of the job.
        columns: of `result_schema`.
        only_looks: a damaged part stays where it is; else it is set aside.
    """
    try:
        return _read_twice(work, name, task, columns)
    except DamagedObjectError as error:
        leave_out(work, name, error, only_looks=only_looks)
        return None


def _read_twice(work: Store, name: str, task: Task, columns: Sequence[str]) -> pa.Table:
    try:
        return checked_result_part(work, name, task, columns)
    except DamagedObjectError:
        # A connection that breaks off can look like damage: only what looks so twice is damaged.
        return checked_result_part(work, name, task, columns)


def checked_result_part(work: Store, name: str, task: Task, columns: Sequence[str] | None = None) -> pa.Table:
    """The columns of a result part of a task; default: all.

    Raises:
        DamagedObjectError: it is not what the digest in its name or the checksums of its pages say, it is not Parquet,
            it lacks a column, a column has another type, or a request key is null.
    """
    schema = result_schema(task)
    wanted = schema.names if columns is None else list(columns)
    told = _DIGEST_IN_NAME.search(name)
    with work.parquet(name, digest=told and told[1]) as file:
        for field in schema:
            place = file.schema_arrow.get_field_index(field.name)
            found = None if place < 0 else file.schema_arrow.field(place).type
            if found != field.type:
                expected = f"expected one column {field.name!r} of type {field.type}"
                raise DamagedObjectError(
                    f"not a result part: {expected}, found {found or 'none'}", uri=work.uri_of(name)
                )
        # Without a digest only decoding a column shows that its pages are whole.
        table = file.read(columns=list({"request_key", *wanted}) if told else schema.names)
    if table["request_key"].null_count:
        raise DamagedObjectError("not a result part: a request key is null", uri=work.uri_of(name))
    return table.select(wanted)
