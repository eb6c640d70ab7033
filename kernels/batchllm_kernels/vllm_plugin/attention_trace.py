"""One line per engine step: whether attention shared prefixes, and why. Another process may read the file meanwhile."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchllm_kernels.attention.cost import Decision

NOT_LOOKED_AT = "not looked at"
"""Reason of a step that went to the stock path unseen: a single request, or a batch that did not pay a moment ago."""


class AttentionTraceWriter:
    """Appends steps to a file; those of several ranks may stand in one.

    Args:
        path: of the file; it is made if need be.
        rank: of the worker.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._rank = rank

    def write(self, *, requests: int, query_tokens: int, decision: Decision | None) -> None:
        """Append the step that is about to run; `decision` is None where it was not looked at."""
        step = {
            "time_s": time.time(),
            "rank": self._rank,
            "requests": requests,
            "query_tokens": query_tokens,
            "share": decision is not None and decision.share,
            "reason": NOT_LOOKED_AT if decision is None else decision.reason,
            "stock_us": None if decision is None else decision.stock_seconds * 1e6,
            "shared_us": None if decision is None else decision.shared_seconds * 1e6,
        }
        os.write(self._file, f"{json.dumps(step)}\n".encode())  # one write: a reader never sees half a line


def read_attention_steps(path: Path, first_byte: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The steps of a file from a byte on, and the byte behind them; none if it is missing."""
    if not path.exists():
        return [], first_byte
    with path.open("rb") as file:
        file.seek(first_byte)
        whole_lines = file.read().rpartition(b"\n")[0]
    steps = [json.loads(line) for line in whole_lines.splitlines()]
    return steps, first_byte + (len(whole_lines) + 1 if steps else 0)
