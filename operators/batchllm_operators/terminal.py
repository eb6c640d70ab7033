"""Whether there is a person at a terminal, and the bar that shows progress there."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

QUIET_VARIABLE = "BATCHLLM_QUIET"


def terminal() -> Console | None:
    """Standard error where it is a terminal; None where it is not, or where `BATCHLLM_QUIET` is set."""
    if os.environ.get(QUIET_VARIABLE) or not sys.stderr.isatty():
        return None
    return Console(stderr=True)


def progress_bar(step: str, console: Console, *columns: ProgressColumn) -> Progress:
    """A bar of a step of the job, which goes when it is stopped: name, bar, description of its task, time so far.

    Args:
        step: its name.
        console: the terminal.
        columns: what stands behind that.
    """
    return Progress(
        TextColumn(step),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        *columns,
        console=console,
        transient=True,
    )
