"""Objects in a folder, on an object store or on a local disk. The only module that knows fsspec.

An object becomes visible whole or not at all: it is written to a local temporary file first and then uploaded by one
PUT or a completed multipart upload, or renamed into place. Leaving a writer by an exception commits nothing.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit
from uuid import uuid4

import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq
from botocore import exceptions as boto
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from batchllm_operators.errors import BatchLLMError, TerminalError, TransientError
from batchllm_operators.records import InputObject
from batchllm_operators.spec import StorageOptions

PARQUET_COMPRESSION = "zstd"
PARTIAL_PREFIX = ".partial-"
_LOCAL_SCHEMES = ("", "file", "local")
_SEQUENTIAL_BYTES = 4 << 20
_WHOLE_OBJECT_BYTES = 16 << 20
_PIECE_BYTES = 32 << 20
_READAHEAD_BATCHES = 2  # more hides no further latency of a store, and each holds its rows in memory


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

    @property
    def options(self) -> StorageOptions:
        """How the store is reached, for another process that opens the same folder."""
        return self._options

    def folder(self, name: str) -> Store:
        """The store of a folder below this one."""
        return Store(self.uri_of(name), self._options)

    def uri_of(self, name: str) -> str:
        """URI of an object of this folder."""
        return f"{self.uri}/{name}"

    def names(self, folder: str = "") -> list[str]:
        """Names of all objects at and below a folder, sorted; empty when there is none."""
        with self._errors(folder):
            return sorted(self._listing(self._path(folder).rstrip("/")))

    def objects(self, pattern: str = "") -> list[InputObject]:
        """The objects below this folder that match a glob pattern (default: all), sorted by path."""
        return [_input_object(name, info) for name, info in sorted(self._matching(pattern).items())]

    def newest(self, pattern: str) -> list[str]:
        """Names of the objects below this folder that match a glob pattern, the last written first.

        A store may round its times to seconds; objects of one time stand by name.
        """
        found = self._matching(pattern)
        return sorted(sorted(found), key=lambda name: _modified(found[name]), reverse=True)

    def object(self, name: str) -> InputObject | None:
        """Size and version of one object; None when there is no object of this name."""
        with self._errors(name):
            self._fs.invalidate_cache(self._path(name).rpartition("/")[0])
            try:
                info = self._fs.info(self._path(name))
            except (FileNotFoundError, NotADirectoryError):
                self._refuse_missing_bucket()
                return None
        return _input_object(name, info) if info["type"] == "file" else None

    def exists(self, name: str) -> bool:
        """Whether an object of this name is there."""
        return self.object(name) is not None

    def read_bytes(self, name: str) -> bytes:
        """Content of an object."""
        with self._errors(name):
            content: bytes = self._fs.cat_file(self._path(name))
            return content

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write an object whole, replacing one of the same name."""
        with self.writer(name) as file:
            file.write(content)

    @contextmanager
    def writer(self, name: str) -> Iterator[IO[bytes]]:
        """A binary file that becomes the object when the block ends without an exception."""
        path = self._path(name)
        if self._local:
            temporary = Path(path).parent / f"{PARTIAL_PREFIX}{uuid4().hex}"
        else:
            temporary = Path(tempfile.gettempdir()) / f"batchllm-{uuid4().hex}"
        with self._errors(name):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            file = temporary.open("xb")
        try:
            with file:
                yield file
                with self._errors(name):
                    file.flush()
                    os.fsync(file.fileno())
            with self._errors(name):
                if self._local:
                    temporary.replace(path)
                    _sync_folder(temporary.parent)
                else:
                    self._fs.put_file(str(temporary), path)
        finally:
            temporary.unlink(missing_ok=True)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a table as one Parquet object."""
        with self.writer(name) as file:
            pq.write_table(table, file, compression=PARQUET_COMPRESSION)

    @contextmanager
    def parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        """An object opened as Parquet; a damaged one raises `TerminalError` with its name."""
        with self._errors(name), self._parquet_content(name) as source:
            yield pq.ParquetFile(source)

    def parquet_schema(self, name: str) -> tuple[pa.Schema, int]:
        """Schema and number of rows of a Parquet object, from its footer."""
        with self.parquet(name) as file:
            return file.schema_arrow, file.metadata.num_rows

    def scan_parquet(self, name: str, columns: Collection[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of a Parquet object in order, as batches of at most `batch_rows`, read ahead by a few batches.

        Memory is bounded by the largest row group (small ones are read together).
        """
        batches = self._row_group_batches(name, list(columns), batch_rows)
        while True:
            # Not around the yield: a fault of the consumer is none of this object.
            with self._errors(name):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _row_group_batches(self, name: str, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        filesystem = pa.fs.PyFileSystem(pa.fs.FSSpecHandler(self._fs))
        fragment = ds.ParquetFileFormat().make_fragment(self._path(name), filesystem=filesystem)
        # A scan keeps all bytes it has read until its end (measured: 490 MB for 320 MB of text): scan by pieces.
        for row_groups in _pieces(fragment.row_groups):
            piece = fragment.subset(row_group_ids=row_groups)
            yield from piece.to_batches(
                columns=columns, batch_size=batch_rows, batch_readahead=_READAHEAD_BATCHES, fragment_readahead=1
            )

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

    def _parquet_content(self, name: str) -> Any:
        if self._local or self._fs.info(self._path(name))["size"] > _WHOLE_OBJECT_BYTES:
            return self._fs.open(self._path(name), "rb")
        return pa.BufferReader(self.read_bytes(name))  # one request, not one a column

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
        if isinstance(error, (pa.ArrowException, EOFError)) or _is_damage(error):
            return TerminalError(f"not a readable Parquet object: {error}", uri=uri)
        if isinstance(error, boto.NoCredentialsError):
            return TerminalError(f"no credentials found for {where}", uri=uri)
        if isinstance(error, FileNotFoundError):
            missing = "bucket does not exist: " if self._bucket_is_missing() else "no such object on "
            return TerminalError(f"{missing}{where}", uri=uri)
        if isinstance(error, PermissionError):
            hint = "" if self._local else ": check the credentials of the default chain and the bucket's policy"
            return TerminalError(f"access denied by {where}{hint}", uri=uri)
        if self._local:
            return TerminalError(f"{where}: {error.strerror}", uri=uri) if isinstance(error, OSError) else None
        if _is_transient(error):
            return TransientError(f"no answer from {where}: {type(error).__name__}", uri=uri)
        if isinstance(error, boto.BotoCoreError):
            return TerminalError(f"{where}: {error}", uri=uri)
        if isinstance(error, OSError):
            kind = TerminalError if _is_refusal(error) else TransientError
            return kind(f"{where} failed: {error}", uri=uri)
        return None

    def _bucket_is_missing(self) -> bool:
        try:
            self._refuse_missing_bucket()
        except FileNotFoundError:
            return True
        except (OSError, boto.BotoCoreError):
            return False  # not known; the first error is the one to tell
        return False

    def _where(self) -> str:
        if self._local:
            return "the local disk"
        endpoint = (
            self._options.endpoint_url
            or os.environ.get("AWS_ENDPOINT_URL_S3")
            or os.environ.get("AWS_ENDPOINT_URL")
            or "AWS"
        )
        return f"endpoint {endpoint.rpartition('@')[2]}, bucket {self._root.split('/')[0]!r}"


def _pieces(row_groups: list[Any]) -> Iterator[list[int]]:
    """Ids of consecutive row groups that are read together: large ones alone, small ones with their neighbours."""
    piece: list[int] = []
    size = 0
    for row_group in row_groups:
        if piece and size + row_group.total_byte_size > _PIECE_BYTES:
            yield piece
            piece, size = [], 0
        piece.append(row_group.id)
        size += row_group.total_byte_size
    if piece:
        yield piece


def _input_object(name: str, info: dict[str, Any]) -> InputObject:
    version = info.get("ETag") or info.get("mtime") or info.get("LastModified")
    if version is None:
        raise TerminalError(f"this store tells neither ETag nor modification time of its objects: {info['name']}")
    return InputObject(path=name, size=int(info["size"]), version=str(version).strip('"'))


def _modified(info: dict[str, Any]) -> float:
    """Seconds since the epoch at which an object was last written."""
    time = info.get("mtime", info.get("LastModified"))
    if time is None:
        raise TerminalError(f"this store tells no modification time of its objects: {info['name']}")
    return time.timestamp() if isinstance(time, datetime) else float(time)


def _is_damage(error: Exception) -> bool:
    """Whether it is Arrow's plain OSError for bytes that do not decode: one of the system has an errno."""
    return type(error) is OSError and error.errno is None and error.__cause__ is None


def _is_transient(error: Exception) -> bool:
    from s3fs.core import S3_RETRYABLE_ERRORS

    return isinstance(
        error, (boto.ConnectionError, boto.HTTPClientError, TimeoutError, ConnectionError, *S3_RETRYABLE_ERRORS)
    )


def _is_refusal(error: OSError) -> bool:
    """Whether the store answered that the request itself is wrong; a conflict (409) or throttling (429) may pass."""
    cause = error.__cause__
    if not isinstance(cause, boto.ClientError):
        return False
    status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    return 400 <= status < 500 and status not in (408, 409, 429)


def _remote_filesystem(scheme: str, options: StorageOptions) -> Any:
    if scheme not in ("s3", "s3a"):
        return fsspec.filesystem(scheme)
    environment = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _s3_filesystem(options, environment, os.getpid())


@lru_cache(maxsize=16)
def _s3_filesystem(options: StorageOptions, environment: tuple[tuple[str, str], ...], process: int) -> Any:
    """One client for equal options, environment and process: fsspec's own cache overlooks the last two."""
    del environment, process  # only tell one cache entry from another
    return fsspec.filesystem(
        "s3",
        anon=options.anonymous,
        profile=options.profile,
        endpoint_url=options.endpoint_url,
        use_listings_cache=False,
        # Arrow asks for just the bytes it needs: the default, 50 MB of read-ahead, made scans 7 times slower.
        default_cache_type="none",
        skip_instance_cache=True,
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
