"""Counts the requests of a job that have no answer yet, which is cheaper than a plan."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from batchllm_operators.plan.requests import read_results
from batchllm_operators.records import StageSummary
from batchllm_operators.store import Store
from batchllm_operators.tasks import task_named
from batchllm_operators.work.columns import KEY_TYPE
from batchllm_operators.work.staged import read_part


def has_requests_left(work: Store, stage: StageSummary) -> bool:
    """Whether readable results leave a staged request without an answer.

    Args:
        work: the work folder; its results are of this job only.
        stage: what staging found.

    Raises:
        TerminalError: a staged part is missing or damaged.
    """
    done = len(read_results([work], task_named(stage.task)).keys)
    if done == 0 or stage.requests == 0:
        return stage.requests > 0
    return _distinct_requests(work, stage) > done


def count_requests(work: Store, stage: StageSummary) -> tuple[int, int]:
    """How many distinct requests a job has, and how many of them have an answer; arguments as `has_requests_left`.

    Nothing is changed: a damaged result part stays where it is.
    """
    return _distinct_requests(work, stage), len(read_results([work], task_named(stage.task), only_looks=True).keys)


def _distinct_requests(work: Store, stage: StageSummary) -> int:
    keys: list[pa.Array] = []
    for part in stage.parts:
        keys += read_part(work, part, ["request_key"])["request_key"].chunks
    distinct: int = pc.count_distinct(pa.chunked_array(keys, KEY_TYPE)).as_py()
    return distinct
