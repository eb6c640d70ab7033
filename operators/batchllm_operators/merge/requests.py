"""Which input rows each request answers, and which copy of a result is taken for it.

All in numpy: 24 bytes a row, and about 45 a distinct request.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchllm_operators.columns.arrays import Bools, Int32s, Int64s
from batchllm_operators.keys import REQUEST_KEY_BYTES
from batchllm_operators.records import StageSummary
from batchllm_operators.row_errors import EXAMPLES_OF_A_KIND
from batchllm_operators.store import Store
from batchllm_operators.tasks.base import Task
from batchllm_operators.work.results import COUNT_COLUMNS, checked_result_part, read_result_part
from batchllm_operators.work.staged import read_part

Keys = npt.NDArray[np.bytes_]
_KEY_DTYPE: np.dtype[np.bytes_] = np.dtype(f"S{REQUEST_KEY_BYTES}")
_NO_PART = -1


@dataclass(frozen=True)
class RequestIndex:
    """The distinct requests of a job, by key, and the rows of each.

    Attributes:
        keys: distinct request keys, sorted; request number i has `keys[i]`.
        rows: row indices, those of request i at `starts[i]` to `starts[i + 1]`, ascending.
        starts: one more than requests.
    """

    keys: Keys
    rows: Int64s
    starts: Int64s

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def row_counts(self) -> Int64s:
        """Rows of each request."""
        return np.diff(self.starts)

    def numbers(self, keys: Keys) -> tuple[Int64s, Bools]:
        """Number of the request of each key, and whether there is one (numbers elsewhere mean nothing)."""
        if not len(self):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), np.bool_)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self) - 1)
        return places.astype(np.int64), self.keys[places] == keys

    def rows_of(self, numbers: Int64s) -> tuple[Int64s, Int64s]:
        """All rows of some requests: (position in `numbers`, row index), one for each row."""
        counts = self.row_counts[numbers]
        positions = np.repeat(np.arange(len(numbers)), counts)
        within = np.arange(len(positions)) - np.repeat(np.cumsum(counts) - counts, counts)
        return positions, self.rows[self.starts[numbers][positions] + within]


def index_requests(stage: StageSummary, work: Store) -> RequestIndex:
    """Read the keys of all staged rows."""
    keys, rows = [np.zeros(0, _KEY_DTYPE)], [np.zeros(0, np.int64)]
    for part in stage.parts:
        table = read_part(work, part, ["row_index", "request_key"])
        staged = table.filter(pc.is_valid(table["request_key"]))
        keys.append(as_keys(staged["request_key"]))
        rows.append(staged["row_index"].to_numpy())
    all_keys = np.concatenate(keys)
    order = np.argsort(all_keys, kind="stable")  # stable: rows of one request stay in input order
    distinct, starts = np.unique(all_keys[order], return_index=True)
    return RequestIndex(distinct, np.concatenate(rows)[order], np.append(starts, len(order)))


@dataclass
class ChosenResults:
    """The copy of a result taken for each request, and sums over those copies.

    Attributes:
        part: number of the result part that holds it; -1 where there is no result.
        row: its row within that part.
        failed: whether it is an error (there was no copy without one).
        error_rows: input rows with an engine's error, by code.
        error_examples: (kind of error, request number, message) of the first few.
    """

    part: Int32s
    row: Int64s
    failed: Bools
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    error_rows: Counter[str] = field(default_factory=Counter)
    error_examples: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def missing(self) -> Int64s:
        """Numbers of the requests without any result."""
        return np.flatnonzero(self.part == _NO_PART)

    @property
    def parts(self) -> list[int]:
        """Numbers of the result parts that a copy is taken from."""
        parts: list[int] = np.unique(self.part[self.part != _NO_PART]).tolist()
        return parts

    def taken_from(self, part: int, numbers: Int64s, known: Bools) -> Int64s:
        """Rows of a result part that are the copies taken."""
        rows = np.arange(len(numbers))
        return np.flatnonzero(known & (self.part[numbers] == part) & (self.row[numbers] == rows))


def choose_results(index: RequestIndex, parts: list[str], work: Store, task: Task) -> ChosenResults:
    """Choose a copy for each request: the first one without an error, else the first one.

    Args:
        index: the requests.
        parts: names of the result parts, in the order of preference.
        work: the work folder.
        task: of the job.

    Raises:
        DamagedObjectError: a part that was whole at first is damaged when it is read again.
    """
    chosen = ChosenResults(
        np.full(len(index), _NO_PART, np.int32), np.zeros(len(index), np.int64), np.zeros(len(index), np.bool_)
    )
    for part, name in enumerate(parts):
        table = read_result_part(work, name, task, COUNT_COLUMNS)
        if table is None:
            continue  # where no other part has what it held, the merge says so and fails
        numbers, known = index.numbers(as_keys(table["request_key"]))
        failed = pc.is_valid(table["error"]).to_numpy()
        # Answers before errors; np.unique then finds the first of each request.
        for wanted_failed in (False, True):
            rows = np.flatnonzero(known & (failed == wanted_failed))
            fresh, first = np.unique(numbers[rows], return_index=True)
            better = chosen.part[fresh] == _NO_PART
            if not wanted_failed:
                better |= chosen.failed[fresh]
            chosen.part[fresh[better]] = part
            chosen.row[fresh[better]] = rows[first[better]]
            chosen.failed[fresh[better]] = wanted_failed
    for part in chosen.parts:
        table = checked_result_part(work, parts[part], task, COUNT_COLUMNS)
        numbers, known = index.numbers(as_keys(table["request_key"]))
        rows = chosen.taken_from(part, numbers, known)
        _count(chosen, table.take(rows), numbers[rows], index)
    return chosen


def as_keys(column: pa.ChunkedArray) -> Keys:
    """A column of request keys as fixed-size numpy bytes."""
    array = column.combine_chunks()
    if not len(array):
        return np.zeros(0, _KEY_DTYPE)
    buffer = array.buffers()[1]
    return np.frombuffer(buffer, _KEY_DTYPE, count=len(array), offset=array.offset * REQUEST_KEY_BYTES)


def _count(chosen: ChosenResults, table: pa.Table, numbers: Int64s, index: RequestIndex) -> None:
    chosen.prompt_tokens += pc.sum(table["prompt_tokens"]).as_py() or 0
    chosen.cached_tokens += pc.sum(table["cached_tokens"]).as_py() or 0
    chosen.completion_tokens += pc.sum(table["completion_tokens"]).as_py() or 0
    for row in np.flatnonzero(chosen.failed[numbers]).tolist():
        error, number = table["error"][row].as_py(), int(numbers[row])
        chosen.error_rows[error["code"]] += int(index.row_counts[number])
        if sum(code == error["code"] for code, _, _ in chosen.error_examples) < EXAMPLES_OF_A_KIND:
            chosen.error_examples.append((error["code"], number, error["message"]))
