"""Objects in a folder, on an object store or on a local disk. With `filesystems`, `store` and `store_errors` it is the
only module that knows fsspec.

An object becomes visible whole or not at all: it is written to a local temporary file first and then uploaded by one
PUT or a completed multipart upload, or renamed into place. Leaving a writer by an exception commits nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import urlsplit

from botocore import exceptions as boto
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from batchllm_operators.conditional_write import put_if
from batchllm_operators.digests import DigestedFile, digest_of
from batchllm_operators.errors import BatchLLMError, TerminalError
from batchllm_operators.filesystems import S3_SCHEMES, locked_folder, remote_filesystem, sync_folder
from batchllm_operators.records import InputObject
from batchllm_operators.schemes import is_foreign, refusing_unknown_schemes
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.store_entries import StoredObject, input_object, modified, version_of
from batchllm_operators.store_errors import FaultPlace, store_text, translated
from batchllm_operators.temporary_folders import upload_folder
from batchllm_operators.unfinished_writes import (
    PARTIAL_PREFIX,
    UnfinishedWrite,
    abort_upload,
    partial_name,
    unfinished_files,
    unfinished_uploads,
)

_LOCAL_SCHEMES = ("", "file", "local")
_SEQUENTIAL_BYTES = 4 << 20


class ObjectStore:
    """A folder whose objects are named by relative paths.

    Args:
        uri: `s3://bucket/prefix`, or a local path. Other fsspec schemes work where their package is installed.
        options: endpoint and profile; credentials come from the default chain.

    All methods raise `TerminalError` for what stays wrong (no such bucket, access denied, missing object) and
    `TransientError` for what may pass (throttling, timeouts); both name the endpoint and the bucket, never a secret.
    """

    def __init__(self, uri: str, options: StorageOptions | None = None) -> None:
        self._options = options or StorageOptions()
        scheme = urlsplit(uri).scheme
        self._local = scheme in _LOCAL_SCHEMES
        self._is_s3 = scheme in S3_SCHEMES
        if self._local:
            self.uri = str(Path(uri.removeprefix("file://").removeprefix("local://")).absolute())
            self._fs = LocalFileSystem()
        else:
            self.uri = uri.rstrip("/")
            with refusing_unknown_schemes(uri):
                self._fs = remote_filesystem(scheme, self._options)
        self._root = self._fs._strip_protocol(self.uri).rstrip("/")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.uri, self._options)

    @property
    def options(self) -> StorageOptions:
        """How the store is reached, for another process that opens the same folder."""
        return self._options

    def folder(self, name: str) -> Self:
        """The store of a folder below this one."""
        return type(self)(self.uri_of(name), self._options)

    def uri_of(self, name: str) -> str:
        """URI of an object of this folder."""
        return f"{self.uri}/{name}"

    def path_from(self, folder: ObjectStore) -> str | None:
        """Where this folder stands in another, "" where it is the same; None where it stands elsewhere.

        On a local disk symbolic links are followed.
        """
        if (type(self._fs), self._where()) != (type(folder._fs), folder._where()):
            return None
        own, other = (os.path.realpath(one._root or "/") if one._local else one._root for one in (self, folder))
        if own == other:
            return ""
        inside = f"{other.rstrip('/')}/"
        return own.removeprefix(inside) if own.startswith(inside) else None

    def names(self, folder: str = "") -> list[str]:
        """Names of all objects at and below a folder, sorted; empty when there is none."""
        with self._errors(folder):
            return sorted(self._listing(self._path(folder).rstrip("/")))

    def objects(self, pattern: str = "") -> list[InputObject]:
        """The objects below this folder that match a glob pattern (default: all), sorted by path."""
        return [input_object(name, info) for name, info in sorted(self._matching(pattern).items())]

    def newest(self, pattern: str) -> list[str]:
        """Names of the objects below this folder that match a glob pattern, the last written first.

        A store may round its times to seconds; objects of one time stand by name.
        """
        found = self._matching(pattern)
        return sorted(sorted(found), key=lambda name: modified(found[name]), reverse=True)

    def stored_objects(self) -> list[StoredObject]:
        """All objects at and below this folder, with their sizes and the times of their last writing."""
        return [
            StoredObject(name, int(info["size"]), modified(info)) for name, info in sorted(self._matching("").items())
        ]

    def object(self, name: str) -> InputObject | None:
        """Size and version of one object; None when there is no object of this name."""
        with self._errors(name):
            self._fs.invalidate_cache(self._path(name).rpartition("/")[0])
            try:
                info = self._fs.info(self._path(name))
            except (FileNotFoundError, NotADirectoryError):
                self._refuse_missing_bucket()
                return None
        return input_object(name, info) if info["type"] == "file" else None

    def exists(self, name: str) -> bool:
        """Whether an object of this name is there."""
        return self.object(name) is not None

    def read_bytes(self, name: str) -> bytes:
        """Content of an object."""
        with self._errors(name):
            content: bytes = self._fs.cat_file(self._path(name))
            return content

    def content(self, name: str) -> bytes | None:
        """Content of an object; None when there is no object of this name."""
        with self._errors(name):
            try:
                content: bytes = self._fs.cat_file(self._path(name))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                self._refuse_missing_bucket()
                return None
        return content

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write an object whole, replacing one of the same name."""
        with self.writer(name) as file:
            file.write(content)

    @contextmanager
    def writer(self, name: str) -> Iterator[DigestedFile]:
        """A binary file that becomes the object when the block ends without an exception."""
        path = self._path(name)
        with self._temporary(name) as (file, temporary):
            yield file
            with self._errors(name):
                file.finish()
                if self._local:
                    temporary.replace(path)
                    sync_folder(temporary.parent)
                else:
                    self._fs.put_file(str(temporary), path)

    def write_if(self, name: str, content: bytes, expected: InputObject | None) -> bool:
        """Write a small object whole, but only in the place of the one that is expected there.

        Where the store honours conditional writes, and on a local disk with locks, of several writers at once just one
        succeeds. Elsewhere the object is looked at before, and read back: two that write at the same moment can both be
        told that they succeeded, so that what hangs on it has to be looked at again later.

        Args:
            name: of the object.
            content: no other writer writes the same.
            expected: what `object` said; None: that there is none.

        Returns:
            Whether the object is now this content.
        """
        if version_of(self.object(name)) != version_of(expected):
            return False
        if self._local:
            self._replace_if(name, content, expected)
        else:
            with self._errors(name):
                put_if(self._fs, self._path(name), content, version_of(expected), conditions=self._is_s3)
        # After a conflict too: a request that was sent twice, because its answer was lost, conflicts with itself.
        return self.content(name) == content

    def _replace_if(self, name: str, content: bytes, expected: InputObject | None) -> None:
        with self._temporary(name) as (file, temporary):
            file.write(content)
            with self._errors(name):
                file.finish()
                with locked_folder(temporary.parent):
                    if version_of(self.object(name)) == version_of(expected):
                        temporary.replace(self._path(name))
                sync_folder(temporary.parent)

    @contextmanager
    def _temporary(self, name: str) -> Iterator[tuple[DigestedFile, Path]]:
        """A file that is gone after the block, beside the object on a local disk; else in the temporary folder."""

        def fault(error: OSError) -> Exception:
            return self._translated(error, name) or error

        with self._errors(name):
            folder = Path(self._path(name)).parent if self._local else upload_folder()
            path = folder / partial_name(name.rpartition("/")[2])
            folder.mkdir(parents=True, exist_ok=True)
            file = DigestedFile(path, fault)
        try:
            yield file, path
        finally:
            file.discard()
            path.unlink(missing_ok=True)

    def digest(self, name: str) -> str:
        """The digest of an object's content, 32 hex digits."""
        with self.reader(name) as source:
            return digest_of(source)

    def move(self, name: str, to: str) -> None:
        """Give an object another name; one that is gone already is no error."""
        with self._errors(name):
            try:
                if self._local:
                    Path(self._path(to)).parent.mkdir(parents=True, exist_ok=True)
                    Path(self._path(name)).replace(self._path(to))
                else:
                    # Not fsspec's `mv`: it takes a name with `*`, `?` or `[` for a pattern, and moves what matches.
                    self._fs.cp_file(self._path(name), self._path(to))
                    self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

    @contextmanager
    def reader(self, name: str) -> Iterator[IO[bytes]]:
        """An object opened for sequential reading."""
        caching = {} if self._local else {"cache_type": "readahead", "block_size": _SEQUENTIAL_BYTES}
        with self._errors(name), self._fs.open(self._path(name), "rb", **caching) as source:
            yield source

    def delete(self, names: list[str]) -> None:
        """Delete objects; missing ones are no error."""
        for name in names:
            with self._errors(name):
                try:
                    self._fs.rm_file(self._path(name))
                except FileNotFoundError:
                    continue

    def remove(self) -> None:
        """Delete this folder with all its objects; a missing one is no error."""
        with self._errors(""):
            try:
                if self._local:
                    self._fs.rm(self._root, recursive=True)
                    return
                names = sorted(self._listing(self._root))
            except FileNotFoundError:
                return
        # Not fsspec's `rm`: it takes a folder with `*`, `?` or `[` in its name for a pattern, and deletes what matches.
        self.delete(names)

    def unfinished_writes(self) -> list[UnfinishedWrite]:
        """What writers at and below this folder have begun and not finished: they were killed, or write now."""
        if not self._local and not self._is_s3:
            return []  # other stores have no uploads that last, or let them expire
        with self._errors(""):
            if self._local:
                return list(unfinished_files(self._root))
            try:
                return list(unfinished_uploads(self._fs, self._root))
            except FileNotFoundError:  # what rclone answers where there is none
                self._refuse_missing_bucket()
                return []

    def discard_writes(self, writes: Iterable[UnfinishedWrite]) -> None:
        """Remove what is left of unfinished writes; whoever writes one of these at this moment fails."""
        with self._errors(""):
            for write in writes:
                if self._local:
                    Path(write.remains).unlink(missing_ok=True)
                else:
                    abort_upload(self._fs, self._root, write)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _matching(self, pattern: str) -> dict[str, dict[str, Any]]:
        with self._errors(""):
            # One level is listed as one level: the folder may be a bucket of millions of deeper objects.
            flat = bool(pattern) and "/" not in pattern and "**" not in pattern
            found = self._listing(self._root, flat=flat)
        if not pattern:
            return found
        matches = re.compile(glob_translate(pattern)).match
        return {name: info for name, info in found.items() if matches(name)}

    def _listing(self, folder: str, *, flat: bool = False) -> dict[str, dict[str, Any]]:
        """Objects by name at (flat) or at and below a folder of the filesystem."""
        self._fs.invalidate_cache()
        try:
            if flat:
                found = {info["name"]: info for info in self._fs.ls(folder or "/", detail=True)}
            elif self._local:
                # The default leaves out, without a word, a folder that may not be read.
                found = self._fs.find(folder, detail=True, on_error="raise")
            else:
                found = self._fs.find(folder, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            found = {}
        if not found:
            self._refuse_missing_bucket()
        named = {str(path).removeprefix(self._root).lstrip("/"): info for path, info in found.items()}
        return {
            name: info
            for name, info in named.items()
            if info["type"] == "file" and not name.rpartition("/")[2].startswith(PARTIAL_PREFIX)
        }

    def _refuse_missing_bucket(self) -> None:
        """A missing folder or object is an answer; a missing bucket is a mistake: raises FileNotFoundError."""
        if not self._local:
            self._fs.info(self._root.split("/")[0])

    @contextmanager
    def _errors(self, name: str, content: str = "object") -> Iterator[None]:
        try:
            yield
        except BatchLLMError:
            raise
        except Exception as error:
            translated = self._translated(error, name, content)
            if translated is None and is_foreign(self.uri):
                # The packages of other stores raise what they like.
                translated = TerminalError(f"{self._where()} failed: {type(error).__name__}: {error}", uri=self.uri)
            if translated is None:
                raise
            raise translated from error

    def _translated(self, error: Exception, name: str, content: str = "object") -> BatchLLMError | None:
        uri = self.uri_of(name) if name else self.uri
        place = FaultPlace(uri, self._where(), self._local, self._bucket_is_missing, content)
        return translated(error, place)

    def _bucket_is_missing(self) -> bool:
        if is_foreign(self.uri):
            return False  # what a bucket is there is not known
        try:
            self._refuse_missing_bucket()
        except FileNotFoundError:
            return True
        except (OSError, boto.BotoCoreError):
            return False  # not known; the first error is the one to tell
        return False

    def _where(self) -> str:
        return "the local disk" if self._local else store_text(self.uri, self._root, self._options)
