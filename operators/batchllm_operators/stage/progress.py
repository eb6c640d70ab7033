"""How far staging is: a bar in a terminal, lines in a log elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, TaskID, TimeRemainingColumn

from batchllm_operators.terminal import progress_bar

LOG_SECONDS = 5.0
"""Lines come between batches of some seconds, so that no pause is longer than 10 s."""


class StageStep(StrEnum):
    """What is done with all rows, one after the other; the value is what a person reads."""

    FIND_COLUMNS = "rows searched for columns"
    SCAN_FIELDS = "fields read"
    STAGE = "rows staged"


class StageProgress:
    """Shows how far staging is while the block runs.

    Args:
        rows: of the input; None where only reading them tells.
        console: the terminal; None: there is none, a line goes to the log every `LOG_SECONDS` instead.
        log: takes one line.
        clock: seconds, increasing.
    """

    def __init__(
        self,
        rows: int | None,
        console: Console | None,
        log: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rows = rows
        self._log = log
        self._clock = clock
        self._step: StageStep | None = None
        self._started = self._logged = 0.0
        self._first_rows = 0
        self._task: TaskID | None = None
        self._bar: Progress | None = None
        if console is not None:
            self._bar = progress_bar("stage", console, TimeRemainingColumn())

    def __enter__(self) -> StageProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: StageStep, rows: int) -> None:
        """Show that a step has done so many rows."""
        now = self._clock()
        if step is not self._step:
            self._begin(step, rows, now)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=rows, description=self._line(rows, now))
        elif now - self._logged >= LOG_SECONDS:
            self._logged = now
            self._log(self._line(rows, now))

    def _begin(self, step: StageStep, rows: int, now: float) -> None:
        # The time of the first batch is not known: a rate is of what comes after it.
        self._step, self._first_rows, self._started, self._logged = step, rows, now, now
        if self._bar is None:
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(step.value, total=self._rows)

    def _line(self, rows: int, now: float) -> str:
        total = "" if self._rows is None else f" of {self._rows:,}"
        seconds = now - self._started
        rate = f", {(rows - self._first_rows) / seconds:,.0f} rows/s" if seconds > 0 else ""
        return f"{rows:,}{total} {self._step}{rate}"
