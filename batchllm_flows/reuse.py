"""What a run takes from earlier runs, and what it leaves for later ones."""

from __future__ import annotations

import logging

from batchllm_flows.publish import Warn
from batchllm_flows.run import JobRun
from batchllm_operators.answers import AnswerStore, keep_answers, reuse_answers
from batchllm_operators.errors import BatchLLMError, TerminalError
from batchllm_operators.records import AnsweredBefore, StageSummary
from batchllm_operators.specs.execution import REUSES
from batchllm_operators.specs.sampling import SamplingSpec
from batchllm_operators.store import Store
from batchllm_operators.tasks import task_named
from batchllm_operators.work.job_file import read_job_file, work_folders_in
from batchllm_operators.work.layout import ANSWERS_FOLDER

MOST_FOLDERS = 8
"""The newest work folders whose answers are looked for: those of runs that were cut off before they kept them."""

_LOGGER = logging.getLogger(__name__)


def take_answers(run: JobRun, staged: StageSummary) -> AnsweredBefore:
    """Take what earlier runs have answered into the work folder of a run, so that it is not planned.

    Runs that were cut off have kept nothing, so what they computed is kept first.

    Args:
        run: the run.
        staged: what staging found.

    Returns:
        What was taken, by this run and by earlier ones of the same job.

    Raises:
        TransientError: the store does not answer.
    """
    answers = _answers_of(run)
    if answers is None or run.answers is None:
        return AnsweredBefore()
    execution = run.job.execution
    if execution.work_uri is None or execution.reuse not in REUSES:
        _keep_those_of_others(run, answers)
    return reuse_answers(
        run.work,
        staged,
        answers,
        run.job.sampling.parameters,
        task_named(run.job.task),
        unseeded=execution.reuse_unseeded,
    )


def leave_answers(run: JobRun, warn: Warn) -> int:
    """Keep the answers of a run that is complete, and let go of those that are too old.

    The run does not fail where they cannot be kept, which is warned of: the next one tries again.

    Args:
        run: the run; its output is complete.
        warn: takes a warning, as `logging.Logger.warning`.

    Returns:
        The number of answers that were kept.
    """
    answers = _answers_of(run)
    if answers is None:
        return 0
    job, execution = run.job, run.job.execution
    kept = 0
    try:
        kept = keep_answers(
            run.work,
            run.job_id,
            answers,
            job.sampling.parameters,
            task_named(job.task),
            unseeded=execution.reuse_unseeded,
        )
        answers.join_small_segments()
        if execution.keep_days is not None:
            answers.delete_older(execution.keep_days)
    except BatchLLMError as error:
        warn("the answers could not be kept for later runs for now, the output is complete: %s", error)
    return kept


def _answers_of(run: JobRun) -> AnswerStore | None:
    """The answers that a run shares; None where it shares none."""
    if run.answers is None:
        return None
    root = run.job.answers_store() or run.sink.folder(ANSWERS_FOLDER)
    return AnswerStore(root.folder(run.answers), task_named(run.job.task))


def _keep_those_of_others(run: JobRun, answers: AnswerStore) -> None:
    """Keep what the newest other work folders of the sink hold of answers in the same scope."""
    root_uri, _, own = run.work.uri.rstrip("/").rpartition("/")
    root = Store(root_uri, run.work.options)
    for folder in [name for name in work_folders_in(root) if name != own][:MOST_FOLDERS]:
        work = root.folder(folder)
        file = read_job_file(work, only_looks=True)
        if file is None or file.answers != run.answers:
            continue
        sampling = SamplingSpec.model_validate(file.job["sampling"]).parameters
        unseeded = run.job.execution.reuse_unseeded
        try:
            kept = keep_answers(
                work, file.job_id, answers, sampling, task_named(file.task), unseeded=unseeded, only_looks=True
            )
        except TerminalError as error:
            # It is the other job's to mend; this one computes what it cannot take.
            _LOGGER.warning("the answers in %s are left out: %s", work.uri, error.message)
            continue
        if kept:
            _LOGGER.info("kept %d answers that the job in %s had computed and not kept", kept, work.uri)
