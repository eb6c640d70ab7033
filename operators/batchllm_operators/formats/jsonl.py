"""The format `jsonl`: one JSON object a line."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import IO

import orjson
import pyarrow as pa

from batchllm_operators.columns.arrow_values import json_values
from batchllm_operators.errors import TerminalError
from batchllm_operators.formats.base import FileFormat, Reader, Writer
from batchllm_operators.formats.content import COMPRESSIONS
from batchllm_operators.formats.input_objects import FoundInput
from batchllm_operators.formats.json_content import (
    DOUBTFUL_SUFFIX,
    JSON_LINES_SUFFIXES,
    refuse_other_than_json_lines,
)
from batchllm_operators.formats.jsonl_source import JsonlSource
from batchllm_operators.formats.source import Source
from batchllm_operators.records import InputObject
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store

_LINE_CHUNK_BYTES = 4 << 20


class JsonlReader(Reader):
    """Reads JSON Lines objects, plain or compressed; only their rows tell their columns."""

    def open(self, spec: SourceSpec, found: FoundInput) -> Source:
        """The rows of all objects; reads the first of them."""
        return JsonlSource(spec, found)

    def refusal(self, store: Store, one: InputObject) -> TerminalError | None:
        """Why an object is no JSON Lines."""
        with store.reader(one.path) as file:
            try:
                refuse_other_than_json_lines(file, one.path)
            except TerminalError as error:
                return error
        return None

    def recognises(self, head: bytes) -> bool:
        """Whether it begins as JSON text does."""
        return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith((b"{", b"["))


class JsonlWriter(Writer):
    """Writes JSON Lines: each input row as it was read, with the members of its answer behind its own."""

    takes = "json"

    def write(self, file: IO[bytes], schema: pa.Schema, tables: Iterator[pa.Table]) -> int:
        """Write one file; returns the number of rows."""
        names = schema.names[1:]
        rows = 0
        for table in tables:
            texts = table.column(0).cast(pa.large_binary()).to_pylist()
            answers = zip(*map(json_values, table.columns[1:]), strict=True)
            lines = []
            for text, answer in zip(texts, answers, strict=True):
                members = orjson.dumps(dict(zip(names, answer, strict=True)))
                # Both are objects in JSON: without the brace between them they are one.
                between = b"" if text[1:].strip() == b"}" else b","
                lines.append(b"%s%s%s\n" % (text.rstrip()[:-1].rstrip(), between, members[1:]))
            file.write(b"".join(lines))  # at once: each write is hashed
            rows += len(table)
        return rows

    def count_rows(self, store: Store, name: str) -> int:
        """The number of lines; reads the whole file."""
        with store.reader(name) as lines:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: lines.read(_LINE_CHUNK_BYTES), b""))


JSONL = FileFormat(
    name="jsonl",
    suffixes=tuple(f"{name}{ending}" for name in JSON_LINES_SUFFIXES for ending in ("", *COMPRESSIONS)),
    content="JSON text",
    reader=JsonlReader(),
    writer=JsonlWriter(),
    doubtful_suffixes=tuple(f"{DOUBTFUL_SUFFIX}{ending}" for ending in ("", *COMPRESSIONS)),
)
