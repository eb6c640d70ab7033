"""Completions to result parts: one immutable Parquet object every so many rows or seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from uuid import uuid4

import pyarrow as pa

from batchllm_operators.errors import TransientError
from batchllm_operators.execute.engine import Completion
from batchllm_operators.records import RESULT_SCHEMA, RESULTS_FOLDER
from batchllm_operators.store import Store

RETRY_PAUSES_SECONDS = (0.5, 1.0, 2.0)


class PartWriter:
    """Buffers completions and writes them as parts, whole or not at all.

    Args:
        store: the work folder.
        part_rows: completions that make a part.
        part_seconds: age of the oldest buffered completion, in seconds, that makes a smaller part.
        on_part: called with the name of each part once it is visible.
        clock: seconds, increasing.
        sleep: waits so many seconds between two attempts.

    A write that fails transiently is tried again with growing pauses; then, and for anything else, the store's error
    is raised, and the completions stay buffered for the next `flush`.
    """

    def __init__(
        self,
        store: Store,
        *,
        part_rows: int,
        part_seconds: float,
        on_part: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._part_rows = part_rows
        self._part_seconds = part_seconds
        self._on_part = on_part
        self._clock = clock
        self._sleep = sleep
        self._buffer: list[Completion] = []
        self._oldest = 0.0
        self._parts: list[str] = []

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts written so far."""
        return tuple(self._parts)

    def add(self, finished: list[Completion]) -> None:
        """Buffer completions, and write a part when there are enough or the oldest has waited long enough."""
        if finished and not self._buffer:
            self._oldest = self._clock()
        self._buffer += finished
        while len(self._buffer) >= self._part_rows:
            self._write(self._part_rows)
        if self._buffer and self._clock() - self._oldest >= self._part_seconds:
            self.flush()

    def flush(self) -> None:
        """Write all that is buffered."""
        while self._buffer:
            self._write(self._part_rows)

    def _write(self, rows: int) -> None:
        part = self._buffer[:rows]
        name = f"{RESULTS_FOLDER}/part-{uuid4().hex}.parquet"
        self._write_patiently(name, part_table(part))
        # Only now: a failed write keeps its rows.
        del self._buffer[:rows]
        self._oldest = self._clock()
        self._parts.append(name)
        self._on_part(name)

    def _write_patiently(self, name: str, table: pa.Table) -> None:
        for pause in RETRY_PAUSES_SECONDS:
            try:
                return self._store.write_table(name, table)
            except TransientError:
                self._sleep(pause)
        return self._store.write_table(name, table)


def part_table(finished: list[Completion]) -> pa.Table:
    """Completions as a table of `RESULT_SCHEMA`, in their order."""
    errors = [
        None if one.error is None else {"code": one.error.code.value, "message": one.error.message} for one in finished
    ]
    return pa.table(
        {
            "request_key": [one.request_key for one in finished],
            "output_token_ids": [one.output_token_ids for one in finished],
            "completion": [one.text for one in finished],
            "finish_reason": [one.finish_reason for one in finished],
            "prompt_tokens": [one.prompt_tokens for one in finished],
            "cached_tokens": [one.cached_tokens for one in finished],
            "completion_tokens": [one.completion_tokens for one in finished],
            "error": errors,
        },
        schema=RESULT_SCHEMA,
    )
