"""Whether there is a person at a terminal to show progress to."""

from __future__ import annotations

import os
import sys

from rich.console import Console

QUIET_VARIABLE = "BATCHLLM_QUIET"


def terminal() -> Console | None:
    """Standard error where it is a terminal; None where it is not, or where `BATCHLLM_QUIET` is set."""
    if os.environ.get(QUIET_VARIABLE) or not sys.stderr.isatty():
        return None
    return Console(stderr=True)
