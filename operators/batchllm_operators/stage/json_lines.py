"""Lines of a JSON Lines object."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import orjson

from batchllm_operators.errors import RowError, RowErrorCode, TerminalError

_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class JsonLine:
    """One line: its object, or why there is none."""

    record: dict[str, Any] = field(default_factory=dict)
    fault: RowError | None = None


def read_json_lines(file: IO[bytes], name: str) -> Iterator[JsonLine]:
    """The lines that are not blank, in order; the last may lack its newline.

    Args:
        file: the object; gzip when its name says so.
        name: of the object, for the messages of faults.

    Raises:
        TerminalError: damaged gzip data.
    """
    for number, line in enumerate(_lines(file, name), start=1):
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if content and not content.isspace():
            yield _parsed(content, f"object {name} line {number}")


def _parsed(line: bytes, where: str) -> JsonLine:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as undecodable:
            return _faulty(f"{where}: invalid UTF-8 at byte {undecodable.start}")
        return _faulty(f"{where}: malformed JSON: {error.msg} at column {error.colno}")
    if not isinstance(record, dict):
        return _faulty(f"{where}: expected a JSON object, got {type(record).__name__}")
    return JsonLine(record)


def _faulty(message: str) -> JsonLine:
    return JsonLine(fault=RowError(RowErrorCode.INVALID_ROW, message))


def _lines(file: IO[bytes], name: str) -> Iterator[bytes]:
    pieces: list[bytes] = []  # of a line longer than a chunk
    for chunk in _chunks(file, name):
        first, *rest = chunk.split(b"\n")
        pieces.append(first)
        if rest:
            yield b"".join(pieces)
            yield from rest[:-1]
            pieces = [rest[-1]]
    yield b"".join(pieces)


def _chunks(file: IO[bytes], name: str) -> Iterator[bytes]:
    content = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
    try:
        while chunk := content.read(_CHUNK_BYTES):
            yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TerminalError(f"source: object {name} is damaged gzip data: {error}") from error
