"""Live progress of the execute step: a terminal bar, and a Prefect progress artifact."""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import cast
from uuid import UUID

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from batchllm_operators.execute.progress import ProgressBoard, ProgressSnapshot

QUIET_VARIABLE = "BATCHLLM_QUIET"
REFRESH_SECONDS = 2.0


class LiveProgress:
    """Shows a progress board while the block runs; use it inside a flow run.

    Args:
        board: filled by the engines' threads.
        artifact_key: key of the Prefect artifact.

    The terminal bar stands on standard error, where that is a terminal, unless `BATCHLLM_QUIET` is set.
    """

    def __init__(self, board: ProgressBoard, artifact_key: str) -> None:
        self._board = board
        self._key = artifact_key
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="live-progress", daemon=True)
        self._bar: Progress | None = None
        self._bar_task: TaskID | None = None
        if not os.environ.get(QUIET_VARIABLE) and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("execute"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )

    def __enter__(self) -> LiveProgress:
        from prefect.artifacts import create_progress_artifact

        snapshot = self._board.snapshot()
        created = create_progress_artifact(0.0, key=self._key, description=progress_line(snapshot))
        # Typed as a coroutine too, which it is inside a running event loop only; these flows are synchronous.
        self._artifact = cast(UUID, created)
        if self._bar is not None:
            self._bar_task = self._bar.add_task(progress_line(snapshot), total=1.0)
            self._bar.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.stop()
        if error is None:
            self._show()

    def _refresh(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            self._show()

    def _show(self) -> None:
        from prefect.artifacts import update_progress_artifact

        snapshot = self._board.snapshot()
        line = progress_line(snapshot)
        if self._bar is not None and self._bar_task is not None:
            self._bar.update(self._bar_task, completed=snapshot.fraction, description=line)
        update_progress_artifact(self._artifact, progress=100.0 * snapshot.fraction, description=line)


def progress_line(snapshot: ProgressSnapshot) -> str:
    """One line: requests done, errors, tokens a second, saving so far, time left."""
    pieces = [f"{snapshot.requests:,} of {snapshot.requests_total:,} requests"]
    if snapshot.errors:
        pieces.append(f"{snapshot.errors:,} errors")
    pieces.append(f"{snapshot.tokens_per_second:,.0f} tokens/s")
    if snapshot.prompt_tokens:
        pieces.append(f"{snapshot.saving:.1%} saved")
    if snapshot.seconds_left is not None:
        minutes, seconds = divmod(round(snapshot.seconds_left), 60)
        pieces.append(f"{minutes}:{seconds:02d} left")
    return ", ".join(pieces)
