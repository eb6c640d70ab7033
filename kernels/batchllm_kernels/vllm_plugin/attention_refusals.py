"""How the processes of an engine say that they refuse prefix-shared attention, and why.

A model's layers are made in vLLM's engine core and workers, and the error that comes back from there says only that a
process failed. So whoever refuses also appends a line to a file that the engine's environment names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_Made = TypeVar("_Made")

REFUSALS_VARIABLE = "BATCHLLM_ATTENTION_REFUSALS"
"""Environment variable with the file to append refusals to; unset: they are only raised."""


def record(reason: str) -> None:
    """Append a reason to the file of refusals, where there is one."""
    path = os.environ.get(REFUSALS_VARIABLE)
    if not path:
        return
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(file, f"{json.dumps(reason)}\n".encode())  # one write: lines of several processes never mix
    finally:
        os.close(file)


def recorded(path: Path) -> tuple[str, ...]:
    """The reasons in a file of refusals, each once, in the order they came; none where the file does not exist."""
    if not path.exists():
        return ()
    return tuple(dict.fromkeys(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()))


def recording(call: Callable[..., _Made], *arguments: Any, **options: Any) -> _Made:
    """What a call gives; what it refuses by a `ValueError` is recorded for who started the engine."""
    try:
        return call(*arguments, **options)
    except ValueError as error:
        record(str(error))
        raise


def refusal(reason: str) -> ValueError:
    """An error to raise, whose reason is recorded for who started the engine."""
    record(reason)
    return ValueError(reason)
