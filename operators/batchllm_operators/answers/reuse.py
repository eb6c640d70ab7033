"""Takes answers of earlier runs into a job's work folder, where they count as its own results."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from batchllm_operators.answers.answer_store import AnswerStore
from batchllm_operators.answers.repeatable import repeatable_keys
from batchllm_operators.columns.arrays import UInt64s
from batchllm_operators.columns.request_keys import ascending_keys, find_in_sorted, key_words
from batchllm_operators.records import AnsweredBefore, StageSummary
from batchllm_operators.specs.sampling import SamplingParameters
from batchllm_operators.store import Store
from batchllm_operators.tasks.base import Task
from batchllm_operators.work.results import COUNT_COLUMNS, encoded_part, read_result_parts
from batchllm_operators.work.reuse import read_reuse, write_reuse


def reuse_answers(
    work: Store,
    stage: StageSummary,
    answers: AnswerStore,
    sampling: SamplingParameters,
    task: Task,
    *,
    unseeded: bool = False,
) -> AnsweredBefore:
    """Write result parts of what earlier runs have answered, so that only the rest is planned and computed.

    Args:
        work: the work folder.
        stage: what staging found.
        answers: the kept answers.
        sampling: of the job.
        task: of the job.
        unseeded: take answers also to requests that are sampled without a seed.

    Returns:
        What all runs of this job have taken from earlier runs.

    Raises:
        TerminalError: a staged part is missing or damaged.
        TransientError: the store does not answer.
    """
    reuse = read_reuse(work)
    if not answers.segments():
        return reuse.answered
    wanted = repeatable_keys(work, stage, sampling, unseeded=unseeded)
    wanted = wanted[find_in_sorted(wanted, _answered_keys(work, task)) < 0]
    parts, total = list(reuse.taken_parts), reuse.answered
    for table in answers.find(wanted):
        name, content = encoded_part(table)
        work.write_bytes(name, content)
        parts.append(name)
        total += AnsweredBefore(
            requests=len(table),
            prompt_tokens=pc.sum(table["prompt_tokens"]).as_py() or 0,
            cached_tokens=pc.sum(table["cached_tokens"]).as_py() or 0,
            completion_tokens=pc.sum(table["completion_tokens"]).as_py() or 0,
        )
        write_reuse(work, reuse.model_copy(update={"taken_parts": tuple(parts), "answered": total}))
    return total


def _answered_keys(work: Store, task: Task) -> UInt64s:
    """The distinct requests that results of the work folder answer without an error, ascending."""
    keys = [np.zeros((0, 2), dtype=np.uint64)]
    for table in read_result_parts(work, task, COUNT_COLUMNS):
        keys.append(key_words(table.filter(table["error"].is_null())["request_key"].combine_chunks()))
    return ascending_keys(np.concatenate(keys))
