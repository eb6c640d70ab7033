"""How many steps of the engines shared prefixes in attention."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from batchllm_flows.html_report.step_trace import READ_ROWS
from batchllm_operators.errors import TerminalError
from batchllm_operators.records import ATTENTION_TRACE_FOLDER
from batchllm_operators.store import Store


@dataclass(frozen=True, slots=True)
class AttentionTrace:
    """Steps of all engines of a run that might have shared prefixes.

    Attributes:
        steps: of all engines.
        shared: those that shared.
        looked_at: those for which the gain was reckoned; the others went to the stock path unseen.
    """

    steps: int
    shared: int
    looked_at: int


def read_attention_trace(work: Store, *, since: float) -> tuple[AttentionTrace | None, list[str]]:
    """The steps that engines with prefix-shared attention made after a moment; in bounded memory.

    Args:
        work: the work folder; its `attention_trace/*.parquet` are read.
        since: seconds since the epoch; steps of earlier runs of the job are left out.

    Returns:
        The trace, or None where there is no such step; and what could not be read.
    """
    steps, shared, looked_at, unreadable = 0, 0, 0, []
    for name in work.names(ATTENTION_TRACE_FOLDER):
        try:
            for batch in work.scan_parquet(name, ("time_s", "rank", "share", "stock_us"), READ_ROWS):
                # Ranks of one engine decide alike.
                taken = batch.filter(pc.and_(pc.greater(batch["time_s"], since), pc.equal(batch["rank"], 0)))
                steps += len(taken)
                shared += pc.sum(taken["share"].cast(pa.int64())).as_py() or 0
                looked_at += len(taken) - taken["stock_us"].null_count
        except TerminalError as error:
            unreadable.append(str(error))
    return (AttentionTrace(steps, shared, looked_at) if steps else None), unreadable
