"""Temporary files of the steps: a full disk is told as just that."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from batchllm_operators.errors import TerminalError
from batchllm_operators.store_errors import disk_is_full


@contextmanager
def full_disk_told(step: str) -> Iterator[None]:
    """For a block that writes temporary files.

    Args:
        step: whose files they are.

    Raises:
        TerminalError: the disk is full; names the folder.
    """
    try:
        yield
    except OSError as error:
        if not disk_is_full(error):
            raise
        raise TerminalError(
            f"{step}: no space left for temporary files in {tempfile.gettempdir()}; set TMPDIR to a folder with more"
        ) from error
