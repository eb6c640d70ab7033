"""Answers in row order: results arrive in any order and leave by row, through spill files on the local disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchllm_operators.columns.arrays import Int64s
from batchllm_operators.errors import TerminalError
from batchllm_operators.merge.requests import ChosenResults, RequestIndex, as_keys
from batchllm_operators.records import StageSummary
from batchllm_operators.store import Store
from batchllm_operators.tasks.base import Task
from batchllm_operators.work.results import answer_columns, checked_result_part
from batchllm_operators.work.staged import read_part

_MOST_PARTITIONS = 128  # each is an open file
_LEAST_PARTITION_ROWS = 16_384
_WAITING_ROWS = 32_768
_WAITING_BYTES = 64 << 20
_FAN_OUT_ROWS = 8_192


class AnswerSpill:
    """Takes answers in any order and gives them back in row order.

    A context manager: its files go when the block ends.

    Args:
        folder: local folder for the spill files.
        rows: input rows; each gets exactly one answer.
        task: of the job.
    """

    def __init__(self, folder: Path, rows: int, task: Task) -> None:
        self.fields = answer_columns(task)
        """The columns of an answer."""
        self._schema = pa.schema([pa.field("row_index", pa.int64(), nullable=False), *self.fields])
        self._folder = folder
        self._rows = rows
        self._partition_rows = max(_LEAST_PARTITION_ROWS, -(-rows // _MOST_PARTITIONS))
        self._files = ExitStack()
        self._writers: dict[int, pa.RecordBatchStreamWriter] = {}
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._waiting_bytes = 0

    def __enter__(self) -> AnswerSpill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def add(self, rows: Int64s, answers: pa.Table) -> None:
        """Take answers.

        Args:
            rows: the row of each answer.
            answers: the columns of `fields`; others are left out.
        """
        columns = [pa.array(rows), *(answers[field.name] for field in self.fields)]
        table = pa.table(columns, schema=self._schema)
        self._waiting.append(table)
        self._waiting_rows += len(table)
        self._waiting_bytes += table.nbytes
        if self._waiting_rows >= _WAITING_ROWS or self._waiting_bytes >= _WAITING_BYTES:
            self._flush()

    def in_row_order(self) -> Iterator[pa.Table]:
        """All answers (the columns of `fields`), in tables that follow each other by row.

        Raises:
            TerminalError: a row has no answer, or more than one.
        """
        self._flush()
        self._files.close()
        for partition, first_row in enumerate(range(0, self._rows, self._partition_rows)):
            rows = np.arange(first_row, min(first_row + self._partition_rows, self._rows))
            table = self._load(partition)
            order = np.argsort(table["row_index"].to_numpy(), kind="stable")
            if not np.array_equal(table["row_index"].to_numpy()[order], rows):
                raise TerminalError(
                    f"merge: rows {rows[0]} to {rows[-1]} need one answer each, {len(rows)} in all; found {len(table)}"
                )
            yield table.drop_columns("row_index").take(order)

    def _flush(self) -> None:
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting)
        self._waiting, self._waiting_rows, self._waiting_bytes = [], 0, 0
        table = table.take(np.argsort(table["row_index"].to_numpy(), kind="stable"))
        partitions = table["row_index"].to_numpy() // self._partition_rows
        numbers, starts = np.unique(partitions, return_index=True)
        ends = np.append(starts[1:], len(table))
        for number, start, end in zip(numbers.tolist(), starts.tolist(), ends.tolist(), strict=True):
            self._writer(number).write_table(table.slice(start, end - start))

    def _writer(self, partition: int) -> pa.RecordBatchStreamWriter:
        if partition not in self._writers:
            file = self._files.enter_context(pa.OSFile(str(self._path(partition)), "wb"))
            self._writers[partition] = self._files.enter_context(pa.ipc.new_stream(file, self._schema))
        return self._writers[partition]

    def _load(self, partition: int) -> pa.Table:
        path = self._path(partition)
        if not path.exists():
            return self._schema.empty_table()
        with pa.OSFile(str(path), "rb") as file, pa.ipc.open_stream(file) as reader:
            table = reader.read_all()
        path.unlink()
        return table

    def _path(self, partition: int) -> Path:
        return self._folder / f"answers-{partition:05d}.arrow"


def spill_staged_errors(stage: StageSummary, work: Store, spill: AnswerSpill) -> None:
    """Give the rows that make no request their error as answer."""
    for part in stage.parts:
        table = read_part(work, part, ["row_index", "request_key", "error"])
        faulty = table.filter(pc.is_null(table["request_key"]))
        if len(faulty):
            columns = [
                faulty["error"] if field.name == "error" else pa.nulls(len(faulty), field.type)
                for field in spill.fields
            ]
            spill.add(faulty["row_index"].to_numpy(), pa.table(columns, schema=pa.schema(spill.fields)))


def spill_results(
    index: RequestIndex, chosen: ChosenResults, parts: list[str], work: Store, spill: AnswerSpill, task: Task
) -> None:
    """Give every other row the chosen copy of its request's result; rows with one request share one."""
    columns = ["request_key", *(field.name for field in spill.fields)]
    for part in chosen.parts:
        table = checked_result_part(work, parts[part], task, columns)
        numbers, known = index.numbers(as_keys(table["request_key"]))
        taken = chosen.taken_from(part, numbers, known)
        positions, rows = index.rows_of(numbers[taken])
        for start in range(0, len(rows), _FAN_OUT_ROWS):
            piece = slice(start, start + _FAN_OUT_ROWS)
            spill.add(rows[piece], table.take(taken[positions[piece]]))
