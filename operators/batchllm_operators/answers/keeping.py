"""Keeps the answers that a job's engines gave, for later runs to find."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from batchllm_operators.answers.answer_store import AnswerStore
from batchllm_operators.answers.repeatable import repeatable_keys
from batchllm_operators.columns.arrays import UInt64s
from batchllm_operators.columns.request_keys import find_in_sorted, key_words
from batchllm_operators.records import StageSummary
from batchllm_operators.specs.sampling import SamplingParameters
from batchllm_operators.store import Store
from batchllm_operators.tasks.base import Task
from batchllm_operators.work.json_objects import read_record
from batchllm_operators.work.layout import STAGED_SUMMARY
from batchllm_operators.work.results import part_names, read_result_part, result_schema
from batchllm_operators.work.reuse import read_reuse


def keep_answers(
    work: Store,
    job_id: str,
    answers: AnswerStore,
    sampling: SamplingParameters,
    task: Task,
    *,
    unseeded: bool = False,
    only_looks: bool = False,
) -> int:
    """Add the answers of a work folder to those that are kept: what its engines computed, and not errors.

    What was kept before is not kept again; what is not staged any more is left out.

    Args:
        work: the work folder; nothing is written there.
        job_id: of its job.
        answers: the kept answers of its model.
        sampling: of its job.
        task: of its job.
        unseeded: keep answers also to requests that are sampled without a seed.
        only_looks: the folder is that of another job: damaged objects stay where they are.

    Returns:
        The number of answers.

    Raises:
        TransientError: the store does not answer.
    """
    taken = read_reuse(work, only_looks=only_looks).taken_parts
    before = answers.parts_of(job_id)
    parts = [name for name in part_names(work) if name not in before and name not in taken]
    stage = read_record(StageSummary, work, STAGED_SUMMARY, only_looks=only_looks) if parts else None
    if stage is None:
        return 0
    allowed = repeatable_keys(work, stage, sampling, unseeded=unseeded)
    kept = answers.add(_answers(work, parts, allowed, task, only_looks=only_looks))
    answers.note_parts(job_id, [*before, *parts])
    return kept


def _answers(work: Store, parts: list[str], allowed: UInt64s, task: Task, *, only_looks: bool) -> Iterator[pa.Table]:
    for name in parts:
        table = read_result_part(work, name, task, result_schema(task).names, only_looks=only_looks)
        if table is None:
            continue
        table = table.filter(table["error"].is_null())
        places = find_in_sorted(key_words(table["request_key"].combine_chunks()), allowed)
        yield table.filter(pa.array(places >= 0))
