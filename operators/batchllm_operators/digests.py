"""Digests of objects: what was written can be told from what a disk or a network made of it."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_DIGEST_BYTES = 16
_CHUNK_BYTES = 4 << 20


class DigestedFile(io.BufferedWriter):
    """A new local file that knows the digest of what was written to it.

    Args:
        path: of the file; it must not be there yet.
        translate: makes the error that `write` raises, of one of the system.
    """

    def __init__(self, path: Path, translate: Callable[[OSError], Exception]) -> None:
        super().__init__(io.FileIO(path, "x"))
        self._written = _new_digest()
        self._translate = translate

    def write(self, content: ReadableBuffer) -> int:
        """Append bytes."""
        self._written.update(content)
        try:
            return super().write(content)
        except OSError as error:
            raise self._translate(error) from error

    def digest(self) -> str:
        """The digest of all bytes written so far, 32 hex digits."""
        return self._written.hexdigest()

    def finish(self) -> None:
        """Make sure that all bytes are on the disk, and close the file."""
        self.flush()
        os.fsync(self.fileno())
        self.close()

    def discard(self) -> None:
        """Close the file, whatever becomes of bytes that are not on the disk yet; no error where it is closed."""
        # A full disk fails here once more; that was told when the bytes were written.
        with suppress(OSError):
            self.close()


def digest_of(content: IO[bytes]) -> str:
    """The digest of all that is left to read, 32 hex digits."""
    digest = _new_digest()
    while chunk := content.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def digest_of_bytes(content: bytes) -> str:
    """The digest of some bytes, 32 hex digits."""
    return digest_of(io.BytesIO(content))


def _new_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"batchllm-object")
