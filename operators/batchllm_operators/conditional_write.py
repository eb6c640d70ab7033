"""Writes that happen only where an object still is what the writer has seen."""

from __future__ import annotations

from typing import Any

from batchllm_operators.store_errors import has_no_conditions, is_conflict


def put_if(filesystem: Any, path: str, content: bytes, version: str | None, *, conditions: bool) -> None:
    """Write an object of a remote store in the place of the version that is expected there.

    A store that refuses the condition is silent: who wants to know reads the object back. One that knows no conditions
    writes in any case.

    Args:
        filesystem: of fsspec.
        path: of the object there.
        content: of the object.
        version: that it has now; None: there is no object.
        conditions: whether the filesystem takes S3's conditions.
    """
    condition = {"mode": "create"} if version is None else {"IfMatch": f'"{version}"'}
    try:
        filesystem.pipe_file(path, content, **(condition if conditions else {}))
    except OSError as error:
        if has_no_conditions(error):
            filesystem.pipe_file(path, content)
        elif not is_conflict(error):
            raise
