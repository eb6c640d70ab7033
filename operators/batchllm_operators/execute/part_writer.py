"""Answers to result parts: one immutable Parquet object every so many rows or seconds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future

from batchllm_operators.errors import TransientError
from batchllm_operators.store import Store
from batchllm_operators.tasks.base import Answer, Task
from batchllm_operators.work.results import answers_table, encoded_part

RETRY_PAUSES_SECONDS = (0.5, 1.0, 2.0)

QUEUED_PARTS = 2
"""Parts that may wait for the store, beside the one it takes; then `add` waits too."""


class PartWriter:
    """Buffers answers and has them written as parts, whole or not at all, while the engine goes on.

    Args:
        store: the work folder.
        task: whose answers they are.
        part_rows: answers that make a part.
        part_seconds: age of the oldest buffered answer, in seconds, that makes a smaller part.
        on_part: called with the name of each part once it is visible, in the thread that wrote it.
        writing: runs the writes, e.g. a thread.
        clock: seconds, increasing.
        sleep: waits so many seconds between two attempts.

    A write that fails transiently is tried again with growing pauses; then, and for anything else, the store's error
    is raised by the next call, and the answers are buffered again for the `flush` after it.
    """

    def __init__(
        self,
        store: Store,
        task: Task,
        *,
        part_rows: int,
        part_seconds: float,
        on_part: Callable[[str], None],
        writing: Executor,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._task = task
        self._part_rows = part_rows
        self._part_seconds = part_seconds
        self._on_part = on_part
        self._writing = writing
        self._clock = clock
        self._sleep = sleep
        self._buffer: list[Answer] = []
        self._oldest = 0.0
        self._handed_over: deque[tuple[list[Answer], Future[None]]] = deque()
        self._parts: list[str] = []

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts written so far."""
        return tuple(self._parts)

    @property
    def idle(self) -> bool:
        """Whether no part that was handed over waits for the store."""
        return all(future.done() for _, future in self._handed_over)

    def add(self, finished: list[Answer]) -> None:
        """Buffer answers, and have a part written when there are enough or the oldest has waited long enough."""
        if finished and not self._buffer:
            self._oldest = self._clock()
        self._buffer += finished
        while len(self._buffer) >= self._part_rows:
            self._hand_over_part()
        if self._buffer and self._clock() - self._oldest >= self._part_seconds:
            self.hand_over()
        while self._handed_over and (len(self._handed_over) > 1 + QUEUED_PARTS or self._handed_over[0][1].done()):
            self._collect()

    def hand_over(self) -> None:
        """Have all that is buffered written, without waiting for it."""
        while self._buffer:
            self._hand_over_part()

    def flush(self) -> None:
        """Have all that is buffered written, and wait until everything is."""
        self.hand_over()
        fault: Exception | None = None
        while self._handed_over:
            try:
                self._collect()
            except Exception as error:
                fault = fault or error
        if fault is not None:
            raise fault

    def _hand_over_part(self) -> None:
        part, self._buffer = self._buffer[: self._part_rows], self._buffer[self._part_rows :]
        self._oldest = self._clock()
        self._handed_over.append((part, self._writing.submit(self._write, part)))

    def _collect(self) -> None:
        """Wait for the oldest part; a failed one is buffered again."""
        part, future = self._handed_over.popleft()
        try:
            future.result()
        except BaseException:
            self._buffer = part + self._buffer
            raise

    def _write(self, part: list[Answer]) -> None:
        name, content = encoded_part(answers_table(self._task, part))
        self._write_patiently(name, content)
        self._parts.append(name)
        self._on_part(name)

    def _write_patiently(self, name: str, content: bytes) -> None:
        for pause in RETRY_PAUSES_SECONDS:
            try:
                self._store.write_bytes(name, content)
            except TransientError:
                self._sleep(pause)
            else:
                return
        self._store.write_bytes(name, content)
