"""The filesystems below a store: clients of object stores, and what the local disk needs to be as safe as they are."""

from __future__ import annotations

import fcntl
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec

from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.storage_retries import client_settings, counted_session

S3_SCHEMES = ("s3", "s3a")


def remote_filesystem(scheme: str, options: StorageOptions) -> Any:
    """The client of an object store, one for equal options, environment and process."""
    if scheme not in S3_SCHEMES:
        _refuse_more_arguments(fsspec.get_filesystem_class(scheme))
        return fsspec.filesystem(scheme)
    environment = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _s3_filesystem(options, environment, os.getpid())


def _refuse_more_arguments(kind: type) -> None:
    """Raises TypeError where a filesystem cannot be made without arguments: half made, some print when they end."""
    parameters = [*inspect.signature(kind.__init__).parameters.values()][1:]  # type: ignore[misc]
    needed = [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    if needed:
        raise TypeError(f"it needs {', '.join(needed)}")


@lru_cache(maxsize=16)
def _s3_filesystem(options: StorageOptions, environment: tuple[tuple[str, str], ...], process: int) -> Any:
    """One client for equal options, environment and process: fsspec's own cache overlooks the last two."""
    del environment, process  # only tell one cache entry from another
    return fsspec.filesystem(
        "s3",
        anon=options.anonymous,
        session=counted_session(options.profile),
        config_kwargs=client_settings(),
        endpoint_url=options.endpoint_url,
        use_listings_cache=False,
        # Arrow asks for just the bytes it needs: the default, 50 MB of read-ahead, made scans 7 times slower.
        default_cache_type="none",
        skip_instance_cache=True,
    )


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes that ask for it from replacing an object there, where the filesystem has such locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # NFS and some others lock no folders: there a writer must read back what it wrote, as on an object store.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make sure that the names of a folder outlive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
