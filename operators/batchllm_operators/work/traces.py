"""`trace/` and `attention_trace/`: what engines did step by step; a report shows them, no answer depends on them.

Traces that cannot be read are left where they are, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from uuid import uuid4

import pyarrow as pa

from batchllm_operators.batch_sizes import NUMBERS_AT_A_TIME
from batchllm_operators.errors import TerminalError
from batchllm_operators.store import Store
from batchllm_operators.work.bundles import short_name
from batchllm_operators.work.layout import ATTENTION_TRACE_FOLDER, TRACE_FOLDER

# Whether each step of an engine shared prefixes in attention, and why; the seconds are those expected of a layer, null
# where the step was not looked at. Ranks of one engine decide alike.
ATTENTION_TRACE_SCHEMA = pa.schema(
    [
        pa.field("time_s", pa.float64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("requests", pa.int32(), nullable=False),
        pa.field("query_tokens", pa.int32(), nullable=False),
        pa.field("share", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("stock_us", pa.float64()),
        pa.field("shared_us", pa.float64()),
    ]
)


def write_steps(work: Store, bundle: str, steps: pa.Table) -> None:
    """Write the steps of an engine, one row each, with the columns of `batchllm_kernels.vllm_plugin.step_trace.STEP`.

    Args:
        work: the work folder.
        bundle: the bundle that has just ended; steps of the next one, begun meanwhile, may be among these.
        steps: since the last call.
    """
    work.write_table(_name(TRACE_FOLDER, bundle), steps)


def write_attention_steps(work: Store, bundle: str, steps: pa.Table) -> None:
    """As `write_steps`, what prefix-shared attention decided in each step (`ATTENTION_TRACE_SCHEMA`)."""
    work.write_table(_name(ATTENTION_TRACE_FOLDER, bundle), steps)


def read_steps(work: Store, columns: Sequence[str], take: Callable[[pa.RecordBatch], None]) -> list[str]:
    """Give the engines' steps to `take`, batch by batch, in bounded memory; returns what could not be read.

    Args:
        work: the work folder.
        columns: those that are wanted.
        take: takes a batch of them.
    """
    return _read(work, TRACE_FOLDER, columns, take)


def read_attention_steps(work: Store, columns: Sequence[str], take: Callable[[pa.RecordBatch], None]) -> list[str]:
    """As `read_steps`, what prefix-shared attention decided in each step (`ATTENTION_TRACE_SCHEMA`)."""
    return _read(work, ATTENTION_TRACE_FOLDER, columns, take)


def _name(folder: str, bundle: str) -> str:
    return f"{folder}/{short_name(bundle)}-{uuid4().hex}.parquet"


def _read(work: Store, folder: str, columns: Sequence[str], take: Callable[[pa.RecordBatch], None]) -> list[str]:
    unreadable = []
    for name in work.names(folder):
        try:
            for batch in work.scan_parquet(name, columns, NUMBERS_AT_A_TIME):
                take(batch)
        except TerminalError as error:
            unreadable.append(str(error))
    return unreadable
