"""Live progress of the execute step: a terminal bar, and a Prefect progress artifact."""

from __future__ import annotations

import threading
import time
from contextvars import copy_context
from types import TracebackType
from typing import cast
from uuid import UUID

from rich.progress import Progress

from batchllm_flows.engine_status import EngineStatus
from batchllm_operators.execute.progress import ProgressBoard, ProgressSnapshot
from batchllm_operators.terminal import progress_bar, terminal
from batchllm_operators.wording import counted

REFRESH_SECONDS = 2.0
LOG_SECONDS = 30.0


class LiveProgress:
    """Shows a progress board while the block runs; use it inside a flow run.

    Args:
        board: filled by the engines' threads.
        artifact_key: key of the Prefect artifact.
        status: what the engines do until their first tokens, to be shown in the place of a progress of nothing.
        refresh_seconds: between two looks at the board.
        log_seconds: between two lines of the flow's log on how far the engines are, from their first tokens on.

    The terminal bar stands on standard error, where that is a terminal, unless `BATCHLLM_QUIET` is set. Faults of the
    Prefect API are warned of once and never leave the block: a display must not fail the job.
    """

    def __init__(
        self,
        board: ProgressBoard,
        artifact_key: str,
        *,
        status: EngineStatus | None = None,
        refresh_seconds: float = REFRESH_SECONDS,
        log_seconds: float = LOG_SECONDS,
    ) -> None:
        self._board = board
        self._log_seconds = log_seconds
        self._logged_at = time.monotonic()
        self._status = status
        self._key = artifact_key
        self._refresh_seconds = refresh_seconds
        self._stop = threading.Event()
        self._artifact: UUID | None = None
        self._warned = False
        self._bar: Progress | None = None
        console = terminal()
        if console is not None:
            self._bar = progress_bar("execute", console)

    def __enter__(self) -> LiveProgress:
        from prefect import get_run_logger

        self._logger = get_run_logger()
        if self._bar is not None:
            self._bar.add_task("", total=1.0)
            self._bar.start()
        self._show()
        # In a copy of the context, so that an artifact first created in the thread still belongs to the flow run.
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._refresh,), name="live-progress", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        # A request to an API in trouble is tried again for a minute: what ends with an error does not wait for it.
        self._thread.join(None if error is None else self._refresh_seconds)
        if self._bar is not None:
            self._bar.stop()
        if error is None:
            self._show()

    def _refresh(self) -> None:
        while not self._stop.wait(self._refresh_seconds):
            self._show()
            self._log()

    def _log(self) -> None:
        loads = self._status is not None and self._status.line()  # which the log is told of already
        if not loads and time.monotonic() - self._logged_at >= self._log_seconds:
            self._logged_at = time.monotonic()
            self._logger.info("%s", progress_line(self._board.snapshot()))

    def _show(self) -> None:
        snapshot = self._board.snapshot()
        line = progress_line(snapshot)
        if self._status is not None and snapshot.requests == 0:
            line = self._status.line() or line
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=snapshot.fraction, description=line)
        try:
            self._publish(100.0 * snapshot.fraction, line)
        except Exception as error:
            if not self._warned:
                self._logger.warning("progress is not shown in Prefect for now, the job goes on: %s", error)
            self._warned = True

    def _publish(self, percent: float, line: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self._artifact is None:
            created = create_progress_artifact(percent, key=self._key, description=line)
            # Typed as a coroutine too, which it is inside a running event loop only; these flows are synchronous.
            self._artifact = cast(UUID, created)
        else:
            update_progress_artifact(self._artifact, progress=percent, description=line)


def progress_line(snapshot: ProgressSnapshot) -> str:
    """One line: requests done, errors, tokens a second, saving so far, time left."""
    pieces = [f"{snapshot.requests:,} of {counted(snapshot.requests_total, 'request')}"]
    if snapshot.errors:
        pieces.append(counted(snapshot.errors, "error"))
    pieces.append(f"{snapshot.tokens_per_second:,.0f} tokens/s")
    if snapshot.prompt_tokens:
        pieces.append(f"{snapshot.saving:.1%} saved")
    if snapshot.seconds_left is not None:
        minutes, seconds = divmod(round(snapshot.seconds_left), 60)
        pieces.append(f"{minutes}:{seconds:02d} left")
    return ", ".join(pieces)
