"""What a filesystem tells of an object: size, version, and when it was written."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from batchllm_operators.errors import TerminalError
from batchllm_operators.records import InputObject


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as its store lists it; `modified` is in seconds since the epoch."""

    path: str
    size: int
    modified: float


def input_object(name: str, info: dict[str, Any]) -> InputObject:
    """The size and the version of an object, by the filesystem's entry of it.

    Raises:
        TerminalError: the store tells neither ETag nor modification time.
    """
    told = (info.get(name) for name in ("ETag", "mtime", "LastModified"))
    version = next((one for one in told if one not in (None, "")), None)  # a time may be 0
    if version is None:
        raise TerminalError(f"this store tells neither ETag nor modification time of its objects: {info['name']}")
    return InputObject(path=name, size=int(info["size"]), version=str(version).strip('"'))


def modified(info: dict[str, Any]) -> float:
    """Seconds since the epoch at which an object was last written.

    Raises:
        TerminalError: the store does not tell.
    """
    time = info.get("mtime", info.get("LastModified"))
    if time is None:
        raise TerminalError(f"this store tells no modification time of its objects: {info['name']}")
    return time.timestamp() if isinstance(time, datetime) else float(time)


def version_of(one: InputObject | None) -> str | None:
    """The version of an object; None where there is no object."""
    return None if one is None else one.version
