"""Faults of stores and of Parquet data in the words of a user, each of a class that says whether to try again."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
from botocore import exceptions as boto

from batchllm_operators.errors import BatchLLMError, DamagedObjectError, TerminalError, TransientError
from batchllm_operators.schemes import is_foreign
from batchllm_operators.spec_base import StorageOptions

_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class FaultPlace:
    """Where a fault was met."""

    uri: str
    where: str
    """The store, as a message names it."""
    local: bool
    bucket_is_missing: Callable[[], bool]
    content: str = "object"
    """What the object was read as."""


def translated(error: Exception, place: FaultPlace) -> BatchLLMError | None:
    """The error in the words of a user; None for a fault of our own."""
    uri, where = place.uri, place.where
    # A flipped bit in a footer can make the name of a column one that does not decode.
    if isinstance(error, (pa.ArrowException, EOFError, UnicodeDecodeError)) or _is_damage(error):
        return DamagedObjectError(f"not a readable {place.content}: {error}", uri=uri)
    if isinstance(error, boto.NoCredentialsError):
        return TerminalError(f"no credentials found for {where}", uri=uri)
    if _code(error) in _EXPIRED:
        return TerminalError(
            f"the credentials for {where} have expired: renew them and run again, which goes on from here; those of a "
            "role, or of a profile with credential_process, are renewed in mid-run",
            uri=uri,
        )
    if isinstance(error, FileNotFoundError):
        missing = "bucket does not exist: " if place.bucket_is_missing() else "no such object on "
        return TerminalError(f"{missing}{where}", uri=uri)
    if isinstance(error, PermissionError):
        hint = "" if place.local else ": check the credentials of the default chain and the bucket's policy"
        return TerminalError(f"access denied by {where}{hint}", uri=uri)
    if isinstance(error, OSError) and disk_is_full(error):
        disk = where if place.local else f"the local disk, for a temporary file in {tempfile.gettempdir()}"
        return TerminalError(f"no space left on {disk}", uri=uri)
    if place.local:
        return TerminalError(f"{where}: {error.strerror}", uri=uri) if isinstance(error, OSError) else None
    if _is_transient(error):
        return TransientError(f"no answer from {where}: {type(error).__name__}", uri=uri)
    if isinstance(error, boto.BotoCoreError):
        return TerminalError(f"{where}: {error}", uri=uri)
    if isinstance(error, OSError):
        kind = TerminalError if _is_refusal(error) else TransientError
        return kind(f"{where} failed: {error}", uri=uri)
    return None


def store_text(uri: str, root: str, options: StorageOptions) -> str:
    """A remote store as messages name it, without credentials.

    Args:
        uri: of a folder there.
        root: its path on the filesystem, which begins with the bucket.
        options: how it is reached.
    """
    if is_foreign(uri):
        return f"the store of {uri}"
    variables = (os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
    endpoint = options.endpoint_url or next(filter(None, variables), "AWS")
    return f"endpoint {endpoint.rpartition('@')[2]}, bucket {root.split('/', maxsplit=1)[0]!r}"


def disk_is_full(error: OSError) -> bool:
    """Whether a local disk, or the user's share of it, has no room left."""
    return error.errno in _FULL


def is_conflict(error: OSError) -> bool:
    """Whether a store refused a conditional write because the object is not what the condition says."""
    return isinstance(error, (FileExistsError, FileNotFoundError)) or _status(error) in (409, 412)


def has_no_conditions(error: OSError) -> bool:
    """Whether a store answered that it knows no conditional writes."""
    return isinstance(error, NotImplementedError) or _status(error) == 501


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
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in (408, 409, 429)


def _status(error: OSError) -> int | None:
    """The HTTP status of a store's answer; None where it gave none."""
    cause = error.__cause__
    if not isinstance(cause, boto.ClientError):
        return None
    status: int = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    return status


def _code(error: Exception) -> str | None:
    """S3's name of the error that a store answered with; None where it gave none."""
    cause = error if isinstance(error, boto.ClientError) else error.__cause__
    if not isinstance(cause, boto.ClientError):
        return None
    code: str | None = cause.response.get("Error", {}).get("Code")
    return code
