"""What writers that were killed have left of objects that they never finished: found and removed.

On a local disk it is a temporary file beside the object, on S3 the parts of an upload that was not completed, which no
listing of objects shows, but which are paid for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

PARTIAL_PREFIX = ".partial-"
_TOKEN_LETTERS = 12


@dataclass(frozen=True)
class UnfinishedWrite:
    """An object that was begun."""

    name: str
    """The object's name in its folder."""
    began: float
    """Seconds since the epoch when the store last heard of it (disk), or when it was begun (S3)."""
    remains: str
    """The path of the temporary file, or the id of the upload."""


def partial_name(name: str) -> str:
    """A name for the temporary file of an object, which no other writer uses.

    Args:
        name: of the object, without folders.
    """
    return f"{PARTIAL_PREFIX}{uuid4().hex[:_TOKEN_LETTERS]}-{name}"


def unfinished_files(root: str) -> Iterator[UnfinishedWrite]:
    """The temporary files at and below a local folder."""
    for folder, _, files in os.walk(root):
        for file in files:
            if not file.startswith(PARTIAL_PREFIX):
                continue
            path = Path(folder, file)
            name = path.with_name(file[len(PARTIAL_PREFIX) + _TOKEN_LETTERS + 1 :]).relative_to(root)
            try:
                yield UnfinishedWrite(str(name), path.stat().st_mtime, str(path))
            except FileNotFoundError:
                continue  # it was finished meanwhile


def unfinished_uploads(fs: Any, root: str) -> Iterator[UnfinishedWrite]:
    """The uploads at and below a folder of S3 that were neither completed nor aborted.

    Args:
        fs: of s3fs.
        root: bucket and prefix, without a `/` at the end.
    """
    bucket, _, prefix = root.partition("/")
    prefix = f"{prefix}/" if prefix else ""
    page: dict[str, str] = {}
    while True:
        answer = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **page)
        for upload in answer.get("Uploads", []):
            name = upload["Key"].removeprefix(prefix)
            yield UnfinishedWrite(name, upload["Initiated"].timestamp(), upload["UploadId"])
        if not answer.get("IsTruncated"):
            return
        page = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}


def abort_upload(fs: Any, root: str, upload: UnfinishedWrite) -> None:
    """Remove the parts of an upload; one that is gone is no error."""
    bucket, _, prefix = root.partition("/")
    key = f"{prefix}/{upload.name}" if prefix else upload.name
    try:
        fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.remains)
    except FileNotFoundError:
        return
