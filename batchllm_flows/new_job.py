"""A job file for an input that somebody has: its columns, and a prompt over them to begin with."""

from __future__ import annotations

import re
from keyword import iskeyword
from typing import Any

import pyarrow as pa
import yaml

from batchllm_flows.job import BatchJob
from batchllm_operators.errors import NoInputError, TerminalError
from batchllm_operators.formats import Source, format_named, format_names, open_source
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.tasks.generate import GENERATION
from batchllm_operators.work.results import answer_columns

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHOWN_COLUMNS = 40

# What a column of the text to work on is often called, the most telling first.
_TEXT_NAMES = (
    "prompt", "question", "instruction", "input", "text", "body", "content", "review", "document", "description",
    "message", "abstract", "article", "comment", "title",
)  # fmt: skip
_ID_NAMES = ("id", "_id", "uuid", "key", "row_id")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def new_job_file(uri: str, *, model: str | None = None, endpoint_url: str | None = None) -> str:
    """The text of a job file, in YAML with comments, for an input; it is a valid job.

    Args:
        uri: object, folder or glob.
        model: id or folder; None: `DEFAULT_MODEL`.
        endpoint_url: S3 endpoint, where it is not AWS.

    Raises:
        TerminalError: there is no input that can be read, or it has no column.
    """
    source = _opened(uri, StorageOptions(endpoint_url=endpoint_url))
    schema = _schema(source)
    if not schema.names:
        raise TerminalError("--input: no row with a column to make a prompt of", uri=uri)
    job = _job(source, schema, model or DEFAULT_MODEL)
    BatchJob.model_validate(job)
    return _with_comments(job, schema)


def _opened(uri: str, storage: StorageOptions) -> Source:
    """The source, in the format of the objects that the URI names."""
    first_fault: TerminalError | None = None
    # A glob or a single object names any ending: what it says itself goes first.
    for form in sorted(format_names(), key=lambda name: (not _has_ending(uri, name), name not in uri.lower())):
        try:
            if format_named(form).reader is None:
                continue
        except TerminalError as error:
            first_fault = first_fault or error
            continue
        try:
            return open_source(SourceSpec(uri=uri, format=form, storage=storage))
        except TerminalError as error:
            # An object that is by its name of this format, and cannot be read, is no object of another.
            if _has_ending(uri, form) and not isinstance(error, NoInputError):
                raise
            first_fault = first_fault or error
    raise first_fault or TerminalError("no format")


def _has_ending(uri: str, form: str) -> bool:
    try:
        return uri.lower().endswith(format_named(form).suffixes)
    except TerminalError:
        return False  # its package cannot be imported, which is told when it is opened


def _schema(source: Source) -> pa.Schema:
    """Columns and types: of Parquet of all rows, of JSONL of the first batch."""
    if source.schema.names:
        return source.schema
    first = next(source.batches(source.columns), None)
    return pa.schema([]) if first is None else first.schema


def _job(source: Source, schema: pa.Schema, model: str) -> dict[str, Any]:
    columns = list(schema.names)
    taken = {field.name for field in answer_columns(GENERATION)}
    spec = source.spec
    section: dict[str, Any] = {"uri": spec.uri, "format": spec.format}
    if (name := _id_column(columns)) is not None:
        section["id_column"] = name
    if taken & set(columns):
        section["columns"] = [name for name in columns if name not in taken]
    sink_format = "parquet" if format_named(spec.format).writer is None else spec.format
    sink: dict[str, Any] = {"uri": _sink_uri(spec.uri), "format": sink_format}
    if spec.storage.endpoint_url is not None:
        section["storage"] = sink["storage"] = {"endpoint_url": spec.storage.endpoint_url}
    return {
        "name": _job_name(spec.uri),
        "source": section,
        "prompt": _prompt(schema),
        "model": {"id": model},
        "sampling": {"temperature": 0.0, "max_tokens": 128},
        "sink": sink,
    }


def _prompt(schema: pa.Schema) -> dict[str, Any]:
    conversation = next((field.name for field in schema if _is_conversation(field.type)), None)
    if conversation is not None:
        return {"kind": "messages", "column": conversation}
    texts = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    candidates = texts or list(schema.names)
    lower = {name.lower(): name for name in reversed(candidates)}
    chosen = next((lower[name] for name in _TEXT_NAMES if name in lower), candidates[0])
    if not _is_template_name(chosen):
        named = next((name for name in candidates if _is_template_name(name)), None)
        if named is None:
            return {"kind": "column", "column": chosen}
        chosen = named
    if chosen.lower() in ("prompt", "question", "instruction"):
        return {"kind": "chat", "user": f"{{{{ {chosen} }}}}"}
    return {"kind": "chat", "user": f"{{{{ {chosen} }}}}\n\nSummarise this in one sentence."}


def _is_template_name(name: str) -> bool:
    """Whether `{{ name }}` is sure to be this column."""
    return _NAME.fullmatch(name) is not None and not iskeyword(name.lower()) and name.lower() not in _JINJA_WORDS


_JINJA_WORDS = ("none", "true", "false", "and", "or", "not", "if", "else", "in", "is", "loop", "self", "range", "dict")


def _is_conversation(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    names = {field.name for field in kind.value_type}
    return {"role", "content"} <= names


def _id_column(columns: list[str]) -> str | None:
    lower = {name.lower(): name for name in reversed(columns)}
    exact = next((lower[name] for name in _ID_NAMES if name in lower), None)
    return exact or next((name for name in columns if name.lower().endswith("_id")), None)


def _sink_uri(source_uri: str) -> str:
    """A folder beside the input, never in it."""
    scheme, separator, path = source_uri.rpartition("://")
    pieces = path.rstrip("/").split("/")
    fixed = pieces[: next((n for n, piece in enumerate(pieces) if any(mark in piece for mark in "*?[")), len(pieces))]
    last = fixed[-1] if fixed else ""
    if len(fixed) == len(pieces) and "." in last:
        fixed = [*fixed[:-1], last.partition(".")[0]]
    in_bucket_root = separator and scheme not in ("file", "local") and len(fixed) == 1
    folder = "/".join(fixed)
    return f"{scheme}{separator}{folder}/_answers" if in_bucket_root else f"{scheme}{separator}{folder or '.'}-answers"


def _job_name(uri: str) -> str:
    pieces = [piece for piece in re.split(r"[/:]+", uri) if piece and not any(mark in piece for mark in "*?[")]
    last = pieces[-1].partition(".")[0] if pieces else ""
    return re.sub(r"[^A-Za-z0-9]+", "-", last).strip("-").lower() or "batch-inference"


def _with_comments(job: dict[str, Any], schema: pa.Schema) -> str:
    fields = [schema.field(n) for n in range(min(len(schema.names), SHOWN_COLUMNS))]
    columns = [f"#   {' '.join(one.name.split())}: {_type_text(one.type)}" for one in fields]
    if len(schema.names) > SHOWN_COLUMNS:
        columns.append(f"#   and {len(schema.names) - SHOWN_COLUMNS:,} more")
    comments = {
        "name": ["# Written by batchllm init. All fields: README.md, or batchllm schema."],
        "source": ["# Where the rows are. Columns found there:", *columns],
        "prompt": [
            "# What is asked of each row: a Jinja template over its columns, {{ column }}. Other kinds: template,",
            "# column, messages, tokens, fields.",
        ],
        "model": ["# A Hugging Face id, or the path of a folder in that layout."],
        "sampling": ["# Temperature 0 gives the most likely answer; max_tokens ends an answer that does not end."],
        "sink": ["# Where the answers go, all input columns with them. Not a folder of the input."],
    }
    lines: list[str] = []
    for section, value in job.items():
        lines += [*comments[section], yaml.safe_dump({section: value}, sort_keys=False, allow_unicode=True).rstrip()]
    return "\n".join(lines) + "\n"


def _type_text(kind: pa.DataType) -> str:
    text = " ".join(str(kind).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
