"""Objects in a folder, on an object store or on a local disk. The only module that knows fsspec.

An object becomes visible whole or not at all: it is written to a local temporary file first and then uploaded by one
PUT or a completed multipart upload, or renamed into place. Leaving a writer by an exception commits nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from botocore import exceptions as boto
from fsspec.implementations.local import LocalFileSystem

from batchllm_operators.errors import BatchLLMError, TerminalError, TransientError
from batchllm_operators.records import InputObject
from batchllm_operators.spec import StorageOptions

PARQUET_COMPRESSION = "zstd"
PARTIAL_PREFIX = ".partial-"
_GLOB_MARKS = "*?["
_LOCAL_SCHEMES = ("", "file", "local")


class Store:
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
        if self._local:
            self.uri = str(Path(uri.removeprefix("file://").removeprefix("local://")).absolute())
            self._fs = LocalFileSystem()
        else:
            self.uri = uri.rstrip("/")
            self._fs = _remote_filesystem(scheme, self._options)
        self._root = self._fs._strip_protocol(self.uri).rstrip("/")

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.uri, self._options)

    def folder(self, name: str) -> Store:
        """The store of a folder below this one."""
        return Store(self.uri_of(name), self._options)

    def uri_of(self, name: str) -> str:
        """URI of an object of this folder."""
        return f"{self.uri}/{name}"

    def arrow_filesystem(self) -> pa.fs.FileSystem:
        """The same store as a pyarrow filesystem; paths are `arrow_path(name)`."""
        return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(self._fs))

    def arrow_path(self, name: str) -> str:
        """Path of an object within `arrow_filesystem()`."""
        return f"{self._root}/{name}"

    def names(self, folder: str = "") -> list[str]:
        """Names of all objects at and below a folder, sorted; empty when there is none."""
        with self._errors(folder):
            self._fs.invalidate_cache()
            found = self._fs.find(self.arrow_path(folder).rstrip("/"))
        names = sorted(self._name(path) for path in found)
        return [name for name in names if not name.rpartition("/")[2].startswith(PARTIAL_PREFIX)]

    def objects(self, pattern: str = "") -> list[InputObject]:
        """The objects below this folder that match a glob pattern (default: all), sorted by path."""
        with self._errors(""):
            self._fs.invalidate_cache()
            if not self._bucket_exists():
                raise FileNotFoundError(self._root)
            if pattern:
                found = self._fs.glob(self.arrow_path(pattern), detail=True)
            else:
                found = self._fs.find(self._root, detail=True)
        return [
            InputObject(path=self._name(path), size=int(info["size"]), version=_version(info))
            for path, info in sorted(found.items())
            if info["type"] == "file"
        ]

    def is_object(self) -> bool:
        """Whether this store's own URI is an object, not a folder."""
        with self._errors(""):
            return bool(self._fs.isfile(self._root))

    def exists(self, name: str) -> bool:
        """Whether an object of this name is there."""
        with self._errors(name):
            self._fs.invalidate_cache(self.arrow_path(name).rpartition("/")[0])
            return bool(self._fs.isfile(self.arrow_path(name)))

    def read_bytes(self, name: str) -> bytes:
        """Content of an object."""
        with self._errors(name):
            content: bytes = self._fs.cat_file(self.arrow_path(name))
            return content

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write an object whole, replacing one of the same name."""
        with self.writer(name) as file:
            file.write(content)

    @contextmanager
    def writer(self, name: str) -> Iterator[IO[bytes]]:
        """A binary file that becomes the object when the block ends without an exception."""
        path = self.arrow_path(name)
        if self._local:
            with self._errors(name):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                descriptor, temporary = tempfile.mkstemp(prefix=PARTIAL_PREFIX, dir=Path(path).parent)
        else:
            descriptor, temporary = tempfile.mkstemp(prefix="batchllm-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            with self._errors(name):
                if self._local:
                    Path(temporary).replace(path)
                    _sync_folder(Path(path).parent)
                else:
                    self._fs.put_file(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a table as one Parquet object."""
        with self.writer(name) as file:
            pq.write_table(table, file, compression=PARQUET_COMPRESSION)

    @contextmanager
    def parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        """An object opened as Parquet; a damaged one raises `TerminalError` with its name."""
        with self._errors(name), self._fs.open(self.arrow_path(name), "rb") as source:
            yield pq.ParquetFile(source)

    @contextmanager
    def reader(self, name: str) -> Iterator[IO[bytes]]:
        """An object opened for sequential reading."""
        with self._errors(name), self._fs.open(self.arrow_path(name), "rb") as source:
            yield source

    def delete(self, names: list[str]) -> None:
        """Delete objects; missing ones are no error."""
        for name in names:
            with self._errors(name):
                try:
                    self._fs.rm_file(self.arrow_path(name))
                except FileNotFoundError:
                    continue

    def _name(self, path: str) -> str:
        return str(path).removeprefix(self._root).lstrip("/")

    def _bucket_exists(self) -> bool:
        return self._local or bool(self._fs.exists(self._root.split("/")[0]))

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except BatchLLMError:
            raise
        except Exception as error:
            translated = self._translated(error, name)
            if translated is None:
                raise
            raise translated from error

    def _translated(self, error: Exception, name: str) -> BatchLLMError | None:
        """The error in the words of a user; None for a fault of our own."""
        uri = self.uri_of(name) if name else self.uri
        where = self._where()
        if isinstance(error, pa.ArrowInvalid):
            return TerminalError(f"not a readable Parquet object: {error}", uri=uri)
        if isinstance(error, boto.NoCredentialsError):
            return TerminalError(f"no credentials found for {where}", uri=uri)
        if isinstance(error, FileNotFoundError):
            if not self._local and not self._bucket_found():
                return TerminalError(f"bucket does not exist: {where}", uri=uri)
            return TerminalError(f"no such object on {where}", uri=uri)
        if isinstance(error, PermissionError):
            return TerminalError(
                f"access denied by {where}: check the credentials of the default chain and the bucket's policy", uri=uri
            )
        if isinstance(error, (boto.ConnectionError, boto.HTTPClientError, TimeoutError, ConnectionError)):
            return TransientError(f"no answer from {where}: {type(error).__name__}", uri=uri)
        if isinstance(error, boto.BotoCoreError):
            return TerminalError(f"{where}: {error}", uri=uri)
        if isinstance(error, OSError) and not self._local:
            return TransientError(f"{where} failed: {error}", uri=uri)
        return None

    def _bucket_found(self) -> bool:
        try:
            return self._bucket_exists()
        except PermissionError:
            return True

    def _where(self) -> str:
        if self._local:
            return "the local disk"
        endpoint = self._options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        return f"endpoint {endpoint}, bucket {self._root.split('/')[0]!r}"


def find_input(uri: str, options: StorageOptions, suffixes: tuple[str, ...]) -> tuple[Store, list[InputObject]]:
    """The objects that a source URI names, sorted by path, with what tells one version of an object from another.

    Args:
        uri: an object, a folder (taken with everything below it), or a glob.
        options: how to reach the store.
        suffixes: endings of data objects; others below a folder are left out, as are names that begin with `_` or `.`.

    Returns:
        The store that the paths are relative to, and the objects.

    Raises:
        TerminalError: nothing matches, no such bucket, access denied.
    """
    folder, pattern = _split_at_glob(uri)
    store = Store(folder, options)
    if not pattern and store.is_object():
        folder, _, pattern = store.uri.rpartition("/")
        store = Store(folder, options)
    objects = store.objects(pattern)
    if not pattern:
        objects = [one for one in objects if one.path.endswith(suffixes) and not _hidden(one.path)]
    if not objects:
        expected = "" if pattern else f" (expected names that end in {', '.join(suffixes)})"
        raise TerminalError(f"source.uri: no object matches{expected}", uri=uri)
    return store, objects


def _split_at_glob(uri: str) -> tuple[str, str]:
    """The folder before the first glob mark, and the pattern below it."""
    first = min((uri.index(mark) for mark in _GLOB_MARKS if mark in uri), default=None)
    if first is None:
        return uri, ""
    folder = uri[:first].rpartition("/")[0]
    return (folder, uri[len(folder) + 1 :]) if folder else (".", uri)


def _version(info: dict[str, Any]) -> str:
    version = info.get("ETag") or info.get("mtime") or info.get("LastModified")
    if version is None:
        raise TerminalError(f"this store tells neither ETag nor modification time of its objects: {info['name']}")
    return str(version).strip('"')


def _hidden(name: str) -> bool:
    return any(piece.startswith(("_", ".")) for piece in name.split("/"))


def _remote_filesystem(scheme: str, options: StorageOptions) -> Any:
    if scheme not in ("s3", "s3a"):
        return fsspec.filesystem(scheme)
    return fsspec.filesystem(
        "s3",
        anon=options.anonymous,
        profile=options.profile,
        endpoint_url=options.endpoint_url,
        use_listings_cache=False,
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
