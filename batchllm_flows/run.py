"""One run of a job: its identity, its folders, and whether its output is complete already."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType

from batchllm_flows.job import BatchJob
from batchllm_flows.new_objects import input_of, last_report
from batchllm_flows.report import JobReport, StepSeconds, load_report
from batchllm_operators.answers import answers_scope
from batchllm_operators.errors import DamagedObjectError, RowErrorCode, TerminalError
from batchllm_operators.execute.engine_options import check_engine_arguments
from batchllm_operators.formats import open_source
from batchllm_operators.machine.devices import gpus_of_machine
from batchllm_operators.machine.processor import processor
from batchllm_operators.merge.sink import check_sink, refuse_overlap
from batchllm_operators.models.dtype_choice import choose_dtype
from batchllm_operators.models.model_files import pinned
from batchllm_operators.records import InputObject
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.store import Store
from batchllm_operators.work.damage import set_aside
from batchllm_operators.work.job_file import is_work_folder, read_job_file, write_job_file
from batchllm_operators.work.layout import REPORT_FILE, RESULTS_FOLDER
from batchllm_operators.work.results import part_names


@dataclass(frozen=True)
class JobRun:
    """A job on the input it found."""

    job: BatchJob
    job_id: str
    objects: tuple[InputObject, ...]
    work: Store
    sink: Store
    complete: JobReport | None
    """The report of the run that completed this very job, if there was one; without new objects, of the last run."""
    reopened: bool = False
    """The output is complete, and written again with the answers that rows with an engine's error get now."""
    answers: str | None = None
    """The scope in which its answers are kept and found, see `answers_scope`; None: they are not."""
    slice_id: str | None = None
    """What tells its output from others that are added to the sink; None: it is the only one there."""


def open_run(job: BatchJob, *, retry_errors: bool = False) -> JobRun:
    """Look at the source, the sink and the work folder; write `job.json`.

    Args:
        job: the job.
        retry_errors: a complete output in which rows have an engine's error does not count as complete.

    Raises:
        TerminalError: an engine argument that vLLM does not know, no input, no access, a sink that holds another job's
            output in mode `error`, a sink or work folder where the source looks for input, a work folder of another
            job, a complete output whose report another version wrote, or one to open again whose results are gone.
    """
    check_engine_arguments(job.model)
    job = job.with_model_defaults()
    found = input_of(job)
    if not found.objects:
        work, report = last_report(job)
        return JobRun(job, report.job_id, (), work, job.sink_store(), _as_before(report))
    source = open_source(job.source, found)
    # Looked up once: what is loaded from here on is of the commit that the id counts.
    model = pinned(job.model)
    identity = job.job_id(source.objects, model)
    answers = _answers_scope(job, model)
    work, sink = job.work_store(identity), job.sink_store()
    refuse_overlap(source, sink, work, job.answers_store())
    _refuse_work_of_another(work, identity)
    slice_id = job.slice_id(identity)
    manifest = check_sink(sink, job.sink.mode, identity, job.sink.layout, slice_id)
    complete = None
    reopened = retry_errors and manifest is not None and RowErrorCode.ENGINE_ERROR in manifest.error_rows
    if reopened and not part_names(work):
        raise TerminalError(
            "retry_errors: the results of this complete job are gone (`batchllm clean`), so that all rows would be"
            " computed again; for that, choose another sink.uri",
            uri=work.uri_of(RESULTS_FOLDER),
        )
    if manifest is not None and not reopened and work.exists(REPORT_FILE):
        complete = _report_of_before(work)
    if complete is None or not is_work_folder(work):
        write_job_file(work, identity, job.model_dump(mode="json"), source.objects, answers, slice_id)
    job = job.model_copy(update={"model": model})
    return JobRun(job, identity, tuple(source.objects), work, sink, complete, reopened, answers, slice_id)


def _answers_scope(job: BatchJob, model: ModelSpec) -> str | None:
    if job.execution.reuse == "none":
        return None
    name = job.name if job.execution.reuse == "same_job_name" else None
    return answers_scope(model, _engine_dtype(model), job.task, name)


def _engine_dtype(model: ModelSpec) -> str:
    """What engines compute in, as far as the machine decides it; on GPUs the model's files do, which count anyway."""
    return model.dtype if gpus_of_machine() else choose_dtype(model, processor(), config={}).dtype


def _report_of_before(work: Store) -> JobReport | None:
    """The report of the run that completed the job; None where it is damaged: then this run makes it again."""
    try:
        report = load_report(work)
    except DamagedObjectError as error:
        set_aside(work, REPORT_FILE, error)
        return None
    return _as_before(report)


def _as_before(report: JobReport) -> JobReport:
    """The report of an earlier run, as that of one which finds its output complete."""
    return report.model_copy(update={"already_complete": True, "computed_requests": 0})


def _refuse_work_of_another(work: Store, identity: str) -> None:
    """A damaged `job.json` is written again: the folder has the job's id as its name."""
    file = read_job_file(work)
    if file is not None and file.job_id != identity:
        raise TerminalError(
            f"execution.work_uri: the work folder holds job {file.job_id}, this is job {identity}; choose another"
            " place",
            uri=work.uri,
        )


class StepTimer:
    """Adds up the seconds of the blocks that one step is made of; `with timer:` around each."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.monotonic() - self._began


class StepClock:
    """Measures the steps of a run; it starts when it is made."""

    def __init__(self) -> None:
        self.started_at = datetime.now(UTC)
        self._started = time.monotonic()
        self.stage, self.plan, self.execute, self.merge = StepTimer(), StepTimer(), StepTimer(), StepTimer()

    def seconds(self) -> StepSeconds:
        """The seconds of each step so far, and of the whole run."""
        return StepSeconds(
            stage=round(self.stage.seconds, 3),
            plan=round(self.plan.seconds, 3),
            execute=round(self.execute.seconds, 3),
            merge=round(self.merge.seconds, 3),
            total=round(time.monotonic() - self._started, 3),
        )
