"""Lines of a JSON Lines object."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import orjson

from batchllm_operators.errors import RowError, RowErrorCode
from batchllm_operators.formats.json_content import json_chunks
from batchllm_operators.formats.unpacking import lines_of

EMPTY_OBJECT = b"{}"
_MOST_DEPTH = 200  # deeper values are of no use, and break what walks through them
_DIGITS_AS_ZEROS = bytes(ord("0") if chr(code).isdigit() and code < 128 else ord(" ") for code in range(256))
_INEXACT_DIGITS = b"0" * 19  # integers of fewer digits are exact in 64 bits
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class JsonLine:
    """One line: its object, or why there is none.

    Attributes:
        record: the object; integers keep all their digits.
        text: the object as it stands in the input, in UTF-8.
        fault: why the line is no row.
    """

    record: dict[str, Any] = field(default_factory=dict)
    text: bytes = EMPTY_OBJECT
    fault: RowError | None = None


def read_json_lines(file: IO[bytes], name: str) -> Iterator[JsonLine]:
    """The lines that are not blank, in order; the last may lack its newline.

    Args:
        file: the object; compressed where its name says so.
        name: of the object, for the messages of faults.

    Raises:
        TerminalError: not JSON Lines at all, or damaged compressed data.
    """
    for number, line in enumerate(lines_of(json_chunks(file, name)), start=1):
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if content and not content.isspace():
            yield _parsed(content, f"object {name} line {number}")


def member_texts(text: bytes) -> dict[str, str]:
    """The members of a JSON object by name, each value as it stands in the text; of equal names, the last.

    Args:
        text: a valid JSON object.
    """
    content = text.decode()
    read = json.JSONDecoder().raw_decode
    members: dict[str, str] = {}
    place = _after_space(content, content.index("{") + 1)
    while content[place] != "}":
        name, place = read(content, place)
        start = _after_space(content, _after_space(content, place) + 1)  # one for the colon
        _, end = read(content, start)
        members[name] = content[start:end]
        place = _after_space(content, end)
        if content[place] == ",":
            place = _after_space(content, place + 1)
    return members


def with_members(line: JsonLine, values: dict[str, Any]) -> JsonLine:
    """A line whose object has these members too, in the place of its own of their names; one at fault stays so."""
    if line.fault is not None:
        return line
    texts = {name: orjson.Fragment(text) for name, text in member_texts(line.text).items()}
    return JsonLine(line.record | values, orjson.dumps({**texts, **values}, default=str))


def _after_space(content: str, place: int) -> int:
    while content[place] in _SPACE:
        place += 1
    return place


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
    if line.count(b"[") + line.count(b"{") > _MOST_DEPTH and _depth(record) > _MOST_DEPTH:
        return _faulty(f"{where}: expected values within values at most {_MOST_DEPTH} deep")
    if _INEXACT_DIGITS in line.translate(_DIGITS_AS_ZEROS):
        record = json.loads(line)  # slower, but integers keep all their digits
    return JsonLine(record, line.strip())


def _depth(value: Any) -> int:
    depth = 0
    level = [value]
    while level:
        depth += 1
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [item for items in inner for item in items]
    return depth


def _faulty(message: str) -> JsonLine:
    return JsonLine(fault=RowError(RowErrorCode.INVALID_ROW, message))
