"""Text objects that may be compressed: their bytes, unpacked, by what they are and what their names say."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import pyarrow as pa

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats.content import COMPRESSIONS

_HEAD_BYTES = 16
_DAMAGES = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


def unpacked_chunks(
    file: IO[bytes],
    name: str,
    chunk_bytes: int,
    *,
    plain_suffixes: tuple[str, ...],
    is_text: Callable[[bytes], bool],
) -> Iterator[bytes]:
    """The bytes of an object in order, unpacked.

    What its first bytes are must be what its name says; a name with none of the known endings says nothing.

    Args:
        file: the object, at its beginning; seekable.
        name: of the object.
        chunk_bytes: most bytes at a time.
        plain_suffixes: endings in lower case that say it is not compressed.
        is_text: whether an object that begins with these bytes is surely text.

    Raises:
        TerminalError: it is not what its name says, or damaged compressed data.
    """
    ending = _compression(_head(file), name, plain_suffixes, is_text)
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


def lines_of(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The lines in some bytes, without their ends; an end behind the last line begins no other."""
    pieces: list[bytes] = []  # of a line longer than a chunk
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        pieces.append(first)
        if rest:
            yield b"".join(pieces)
            yield from rest[:-1]
            pieces = [rest[-1]]
    last = b"".join(pieces)
    if last:
        yield last


def not_what_it_says(name: str, what: str) -> TerminalError:
    """The error for an object that is not what its name, or the job, says."""
    return TerminalError(f"source: object {name} is {what}")


def _compression(
    head: bytes, name: str, plain_suffixes: tuple[str, ...], is_text: Callable[[bytes], bool]
) -> str | None:
    """How the object is compressed, by its first bytes and its name."""
    ending = next((suffix for suffix in COMPRESSIONS if name.lower().endswith(suffix)), None)
    found = next((suffix for suffix, (_, magic) in COMPRESSIONS.items() if head.startswith(magic)), None)
    if ending is not None and found != ending:
        said = COMPRESSIONS[ending][0]
        if found is not None:
            raise not_what_it_says(name, f"{COMPRESSIONS[found][0]} data, and its name says {said}: rename it")
        if is_text(head):
            raise not_what_it_says(name, f"plain text, and its name says {said}: rename it without {ending}")
        return ending if head else None
    if ending is None and found is not None and name.lower().endswith(plain_suffixes):
        kind = COMPRESSIONS[found][0]
        raise not_what_it_says(name, f"{kind} data, and its name does not say so: rename it to end in {found}")
    return found


def _head(file: IO[bytes]) -> bytes:
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    return head


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
