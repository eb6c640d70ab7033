"""Temporary folders that do not outlive their process for long: the next one removes what a killed one has left."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from batchllm_operators.process_identity import ProcessIdentity, is_surely_gone, this_process

_OWNER_FILE = ".owner.json"
_MAKING = threading.Lock()


class OwnedFolder(tempfile.TemporaryDirectory[str]):
    """A temporary folder of this process; a context manager, as the class above it.

    Folders of the same kind whose processes have ended go when one is made.

    Args:
        kind: what the folder is for, `engines`; its name begins with `batchllm-engines-`.
    """

    def __init__(self, kind: str) -> None:
        prefix = f"batchllm-{kind}-"
        for folder in abandoned_folders(prefix):
            shutil.rmtree(folder, ignore_errors=True)  # another process may do the same
        super().__init__(prefix=prefix)
        (Path(self.name) / _OWNER_FILE).write_text(this_process().model_dump_json())


def upload_folder() -> Path:
    """Where this process keeps files until they are uploaded."""
    # Two threads that ask at the same moment would make two, of which one would end with its only user's call.
    with _MAKING:
        return Path(_uploads_of(os.getpid(), tempfile.gettempdir()).name)


@cache
def _uploads_of(process: int, folder: str) -> OwnedFolder:
    """One for a process, which ends with it; another process that began as a copy of this one has its own."""
    del process, folder
    return OwnedFolder("uploads")


def abandoned_folders(prefix: str = "batchllm-") -> list[Path]:
    """The folders of processes that have ended; their names begin with the prefix."""
    found = []
    for owner_file in Path(tempfile.gettempdir()).glob(f"{prefix}*/{_OWNER_FILE}"):
        try:
            owner = ProcessIdentity.model_validate_json(owner_file.read_text())
        except (OSError, ValidationError):
            continue  # another process removes or makes it now, or it is another user's
        if is_surely_gone(owner):
            found.append(owner_file.parent)
    return found
