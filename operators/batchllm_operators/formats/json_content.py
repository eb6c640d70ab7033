"""What an object of JSON Lines really holds, told from its first bytes."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from functools import partial
from typing import IO

import orjson

from batchllm_operators.formats.content import foreign_content, is_markup
from batchllm_operators.formats.unpacking import not_what_it_says, unpacked_chunks

_CHUNK_BYTES = 4 << 20
_SNIFFED_BYTES = 64 << 10  # enough to tell lines from one document
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
DOUBTFUL_SUFFIX = ".json"
"""Ending of objects that may as well hold one JSON document, such as settings."""
_PLAIN_SUFFIXES = (*JSON_LINES_SUFFIXES, DOUBTFUL_SUFFIX)
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"{\x00", b"\x00{", b"[\x00", b"\x00[", b"\x00\x00\x00{")


def json_chunks(file: IO[bytes], name: str) -> Iterator[bytes]:
    """The bytes of a JSON Lines object in order, unpacked.

    What its first bytes are must be what its name says; a name with none of the known endings says nothing.

    Args:
        file: the object, at its beginning; seekable.
        name: of the object.

    Raises:
        TerminalError: no JSON Lines: says what the object is instead and what to do; or damaged compressed data.
    """
    chunks = _unpacked(file, name, _CHUNK_BYTES)
    first = next(chunks, b"")
    _refuse_other_content(first, name)
    if first:
        yield first
    yield from chunks


def refuse_other_than_json_lines(file: IO[bytes], name: str) -> None:
    """Look at the beginning of an object, by the rules of `json_chunks`.

    Raises:
        TerminalError: as there.
    """
    first = next(_unpacked(file, name, _SNIFFED_BYTES), b"")
    _refuse_other_content(first, name)


def _begins_as_json(head: bytes) -> bool:
    return head.lstrip().startswith((b"{", b"[", codecs.BOM_UTF8))


_unpacked = partial(unpacked_chunks, plain_suffixes=_PLAIN_SUFFIXES, is_text=_begins_as_json)


def _refuse_other_content(first: bytes, name: str) -> None:
    """Refuse what is no JSON Lines as a whole; one bad line is the fault of its row."""
    what = foreign_content(first, "jsonl")
    if what is not None:
        raise not_what_it_says(name, what)
    if first.startswith(_UTF16):
        raise not_what_it_says(name, "text in UTF-16 or UTF-32: convert it to UTF-8")
    lines = [line for line in first.removeprefix(codecs.BOM_UTF8)[:_SNIFFED_BYTES].split(b"\n", 16) if line.strip()]
    if not lines or _holds_an_object(lines[0]) or (len(lines) > 1 and _holds_an_object(lines[1])):
        return
    begin = lines[0].strip()
    second = lines[1].strip() if len(lines) > 1 else b""
    if begin.startswith(b"[") and (not second or not _is_json(begin)):
        raise not_what_it_says(name, f"one JSON array, not JSON Lines: {_HOW_TO_MAKE_LINES.format('.[]')}")
    if begin.startswith(b"{") and second.startswith((b'"', b"}")) and not _is_json(begin):
        what = "JSON printed over several lines, not JSON Lines"
        raise not_what_it_says(name, f"{what}: {_HOW_TO_MAKE_LINES.format('.')}")
    if is_markup(begin):
        raise not_what_it_says(name, "HTML or XML (an error page?): look at it, and write it again as JSON Lines")
    if second and not begin.startswith((b"{", b"[")) and not second.startswith((b"{", b"[")):
        start = begin[:40].decode(errors="replace")
        raise not_what_it_says(name, f"no JSON Lines: it begins with {start!r}; expected one JSON object a line")


_HOW_TO_MAKE_LINES = "write one object a line, for example with jq -c '{}'"


def _holds_an_object(line: bytes) -> bool:
    return line.strip().startswith(b"{") and line.strip().endswith(b"}")


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True
