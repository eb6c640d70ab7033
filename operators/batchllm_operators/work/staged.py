"""`staged/`: what every input row became, in the order of the rows; parts first, their summary last.

A later run takes up what is staged where the summary is of its input and its settings and all parts have the digests
that it tells. Whoever reads parts afterwards relies on that.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from batchllm_operators.columns.arrays import Int64s
from batchllm_operators.records import StagedPart, StageSummary
from batchllm_operators.store import Store
from batchllm_operators.work.columns import ERROR_TYPE, KEY_TYPE, TOKENS_TYPE
from batchllm_operators.work.damage import set_aside
from batchllm_operators.work.json_objects import read_record, write_record
from batchllm_operators.work.layout import STAGED_FOLDER, STAGED_SUMMARY

READERS = 8
"""Parts read at a time: reading mostly waits for the disk or the network."""

# One row per input row. A row with an error has a null key and no tokens. `sampling` is the JSON text of the
# request's sampling parameters where a row overrides the job's, else null; max_tokens is always the effective one.
STAGED_SCHEMA = pa.schema(
    [
        pa.field("row_index", pa.int64(), nullable=False),
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("request_key", KEY_TYPE),
        pa.field("prompt_token_ids", TOKENS_TYPE),
        pa.field("max_tokens", pa.int32()),
        pa.field("sampling", pa.string()),
        pa.field("error", ERROR_TYPE),
    ]
)

# In the staged rows too where the job has an override column: what a row says of the length of its own completion.
ESTIMATE_FIELD = pa.field("expected_output_tokens", pa.int32())

# In the staged rows too where the source has a filter: the number of the row over all rows of the input objects.
SOURCE_ROW_FIELD = pa.field("source_row", pa.int64(), nullable=False)


def write_part(work: Store, number: int, table: pa.Table, first_row: int) -> StagedPart:
    """Write rows as one part.

    Args:
        work: the work folder.
        number: of the part.
        table: of `STAGED_SCHEMA`, with the fields that some jobs have beside it.
        first_row: index of its first row.
    """
    name = f"{STAGED_FOLDER}/part-{number:05d}.parquet"
    return StagedPart(name=name, first_row=first_row, rows=len(table), digest=work.write_table(name, table))


def write_summary(work: Store, summary: StageSummary) -> None:
    """Write the summary, which makes the parts count."""
    write_record(work, STAGED_SUMMARY, summary)


def read_part(work: Store, part: StagedPart, columns: Sequence[str]) -> pa.Table:
    """Some columns of a part.

    Raises:
        TerminalError: it is missing or damaged (its name).
    """
    with work.parquet(part.name) as file:
        return file.read(list(columns))


def scan_part(work: Store, part: StagedPart, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Some columns of a part, batch by batch; as `read_part`, without those that the part does not have."""
    with work.parquet(part.name) as file:
        there = [name for name in columns if name in file.schema_arrow.names]
        yield from file.iter_batches(batch_size=batch_rows, columns=there)


def source_rows(work: Store, summary: StageSummary) -> Int64s:
    """int64 [rows], of a source with a filter: the number of each staged row over all rows of the input objects.

    Raises:
        TerminalError: a part is missing or damaged (its name).
    """
    numbers = [read_part(work, part, [SOURCE_ROW_FIELD.name])[0].to_numpy() for part in summary.parts]
    return np.concatenate(numbers) if numbers else np.zeros(0, np.int64)


def finished_staging(work: Store, input_digest: str, settings_digest: str) -> StageSummary | None:
    """The summary of what is staged, if it is of this input and these settings, and whole.

    Otherwise nothing counts as staged afterwards, and what is damaged is set aside.

    Args:
        work: the work folder.
        input_digest: as the summary should have it.
        settings_digest: likewise.
    """
    summary = read_record(StageSummary, work, STAGED_SUMMARY)
    if summary is not None and (summary.input_digest, summary.settings_digest) == (input_digest, settings_digest):
        damaged = _changed_parts(work, summary.parts)
        if not damaged:
            return summary
        for name in damaged.keys() & set(work.names(STAGED_FOLDER)):
            set_aside(work, name, damaged[name])
    # The parts stay: without the summary they mean nothing, and another run of the job may be writing them.
    work.delete([STAGED_SUMMARY])
    return None


def _changed_parts(work: Store, parts: Sequence[StagedPart]) -> dict[str, str]:
    """The staged parts that are not what the summary says, and what is wrong with each."""
    there = set(work.names(STAGED_FOLDER))

    def fault(part: StagedPart) -> str | None:
        if part.name not in there:
            return "it is missing"
        found = work.digest(part.name)
        return None if found == part.digest else f"expected digest {part.digest}, found {found}"

    with ThreadPoolExecutor(READERS, thread_name_prefix="staged-check") as readers:
        faults = zip(parts, readers.map(fault, parts), strict=True)
        return {part.name: found for part, found in faults if found is not None}


def carried_schema(summary: StageSummary) -> pa.Schema:
    """The schema of the input columns that go to the sink, as staging found it."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(summary.source_schema)))
