"""The traces that engines leave in the work folder, read in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from batchllm_operators.errors import TerminalError
from batchllm_operators.store import NUMBERS_AT_A_TIME, Store


def read_traces(work: Store, folder: str, columns: Sequence[str], take: Callable[[pa.RecordBatch], None]) -> list[str]:
    """Give all steps of a folder to `take`, batch by batch; returns what could not be read.

    Args:
        work: the work folder.
        folder: of the traces; its Parquet files are read.
        columns: those that are wanted.
        take: takes a batch of them.
    """
    unreadable = []
    for name in work.names(folder):
        try:
            for batch in work.scan_parquet(name, columns, NUMBERS_AT_A_TIME):
                take(batch)
        except TerminalError as error:
            unreadable.append(str(error))
    return unreadable
