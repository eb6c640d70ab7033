"""What an object of JSON Lines really holds, told from its first bytes."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Iterator
from typing import IO, Any

import orjson
import pyarrow as pa

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats.content import COMPRESSIONS, foreign_content, is_markup

_CHUNK_BYTES = 4 << 20
_SNIFFED_BYTES = 64 << 10  # enough to tell lines from one document
_HEAD_BYTES = 16
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
DOUBTFUL_SUFFIX = ".json"
"""Ending of objects that may as well hold one JSON document, such as settings."""
_PLAIN_SUFFIXES = (*JSON_LINES_SUFFIXES, DOUBTFUL_SUFFIX)
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"{\x00", b"\x00{", b"[\x00", b"\x00[", b"\x00\x00\x00{")
_DAMAGES = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


def json_chunks(file: IO[bytes], name: str) -> Iterator[bytes]:
    """The bytes of a JSON Lines object in order, unpacked.

    What its first bytes are must be what its name says; a name with none of the known endings says nothing.

    Args:
        file: the object, at its beginning; seekable.
        name: of the object.

    Raises:
        TerminalError: no JSON Lines: says what the object is instead and what to do; or damaged compressed data.
    """
    chunks = _unpacked(file, _compression(_head(file), name), name, _CHUNK_BYTES)
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
    first = next(_unpacked(file, _compression(_head(file), name), name, _SNIFFED_BYTES), b"")
    _refuse_other_content(first, name)


def _compression(head: bytes, name: str) -> str | None:
    """How the object is compressed, by its first bytes and its name."""
    ending = next((suffix for suffix in COMPRESSIONS if name.lower().endswith(suffix)), None)
    found = next((suffix for suffix, (_, magic) in COMPRESSIONS.items() if head.startswith(magic)), None)
    if ending is not None and found != ending:
        said = COMPRESSIONS[ending][0]
        if found is not None:
            raise _not_what_it_says(name, f"{COMPRESSIONS[found][0]} data, and its name says {said}: rename it")
        if head.lstrip().startswith((b"{", b"[", codecs.BOM_UTF8)):
            raise _not_what_it_says(name, f"plain text, and its name says {said}: rename it without {ending}")
        return ending if head else None
    if ending is None and found is not None and name.lower().endswith(_PLAIN_SUFFIXES):
        kind = COMPRESSIONS[found][0]
        raise _not_what_it_says(name, f"{kind} data, and its name does not say so: rename it to end in {found}")
    return found


def _head(file: IO[bytes]) -> bytes:
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    return head


def _unpacked(file: IO[bytes], ending: str | None, name: str, chunk_bytes: int) -> Iterator[bytes]:
    try:
        content = _reader(file, ending)
        while chunk := content.read(chunk_bytes):
            yield chunk
    except _DAMAGES as error:
        raise _damaged(name, ending, error) from error
    except OSError as error:
        # bz2 and Arrow have a plain OSError for data that does not unpack; one of the system has an errno.
        if ending is None or error.errno is not None or type(error) is not OSError:
            raise
        raise _damaged(name, ending, error) from error


def _reader(file: IO[bytes], ending: str | None) -> Any:
    if ending == ".gz":
        return gzip.GzipFile(fileobj=file)
    if ending == ".bz2":
        return bz2.BZ2File(file)
    if ending == ".xz":
        return lzma.LZMAFile(file)
    if ending in (".zst", ".lz4"):
        return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd" if ending == ".zst" else "lz4")
    return file


def _damaged(name: str, ending: str | None, error: Exception) -> TerminalError:
    kind = COMPRESSIONS[ending][0] if ending is not None else ""
    return TerminalError(f"source: object {name} is damaged {kind} data: {error}")


def _refuse_other_content(first: bytes, name: str) -> None:
    """Refuse what is no JSON Lines as a whole; one bad line is the fault of its row."""
    what = foreign_content(first, "jsonl")
    if what is not None:
        raise _not_what_it_says(name, what)
    if first.startswith(_UTF16):
        raise _not_what_it_says(name, "text in UTF-16 or UTF-32: convert it to UTF-8")
    lines = [line for line in first.removeprefix(codecs.BOM_UTF8)[:_SNIFFED_BYTES].split(b"\n", 16) if line.strip()]
    if not lines or _holds_an_object(lines[0]) or (len(lines) > 1 and _holds_an_object(lines[1])):
        return
    begin = lines[0].strip()
    second = lines[1].strip() if len(lines) > 1 else b""
    if begin.startswith(b"[") and (not second or not _is_json(begin)):
        raise _not_what_it_says(name, f"one JSON array, not JSON Lines: {_HOW_TO_MAKE_LINES.format('.[]')}")
    if begin.startswith(b"{") and second.startswith((b'"', b"}")) and not _is_json(begin):
        what = "JSON printed over several lines, not JSON Lines"
        raise _not_what_it_says(name, f"{what}: {_HOW_TO_MAKE_LINES.format('.')}")
    if is_markup(begin):
        raise _not_what_it_says(name, "HTML or XML (an error page?): look at it, and write it again as JSON Lines")
    if second and not begin.startswith((b"{", b"[")) and not second.startswith((b"{", b"[")):
        start = begin[:40].decode(errors="replace")
        raise _not_what_it_says(name, f"no JSON Lines: it begins with {start!r}; expected one JSON object a line")


_HOW_TO_MAKE_LINES = "write one object a line, for example with jq -c '{}'"


def _holds_an_object(line: bytes) -> bool:
    return line.strip().startswith(b"{") and line.strip().endswith(b"}")


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _not_what_it_says(name: str, what: str) -> TerminalError:
    return TerminalError(f"source: object {name} is {what}")
