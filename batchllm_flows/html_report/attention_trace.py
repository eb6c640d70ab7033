"""How many steps of the engines shared prefixes in attention."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from batchllm_operators.store import Store
from batchllm_operators.work.traces import read_attention_steps


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
        work: the work folder.
        since: seconds since the epoch; steps of earlier runs of the job are left out.

    Returns:
        The trace, or None where there is no such step; and what could not be read.
    """
    found: list[AttentionTrace] = []

    def take(batch: pa.RecordBatch) -> None:
        # Ranks of one engine decide alike.
        taken = batch.filter(pc.and_(pc.greater(batch["time_s"], since), pc.equal(batch["rank"], 0)))
        shared = pc.sum(taken["share"].cast(pa.int64())).as_py() or 0
        found.append(AttentionTrace(len(taken), shared, len(taken) - taken["stock_us"].null_count))

    unreadable = read_attention_steps(work, ("time_s", "rank", "share", "stock_us"), take)
    total = AttentionTrace(
        steps=sum(one.steps for one in found),
        shared=sum(one.shared for one in found),
        looked_at=sum(one.looked_at for one in found),
    )
    return (total if total.steps else None), unreadable
