"""How far jobs are, from what their work folders hold."""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import Field

from batchllm_flows.last_error import LastError, read_last_error
from batchllm_flows.work_folders import find_work_folders, job_folder
from batchllm_operators.errors import TerminalError
from batchllm_operators.plan.unanswered import count_requests
from batchllm_operators.process_identity import is_surely_gone
from batchllm_operators.records import PlanSummary, Record, StageSummary
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.store import Store
from batchllm_operators.wording import counted, size_text
from batchllm_operators.work.json_objects import read_record
from batchllm_operators.work.layout import PLAN_SUMMARY, REPORT_FILE, RESULTS_FOLDER, STAGED_SUMMARY
from batchllm_operators.work.lease import read_lease


class JobStatus(Record):
    """How far one job is; what is None is not there yet, or gone."""

    job_id: str
    job_name: str
    complete: bool
    """Its output stands in the sink."""
    replaced: bool = False
    """It had been completed, and its output does not stand there any more."""
    rows: int | None = None
    """Staged, or in the complete output."""
    error_rows: dict[str, int] = Field(default_factory=dict)
    """Rows without an answer by kind of error: all of a complete job, else those that staging found."""
    requests: int | None = None
    """Distinct requests staged."""
    answered: int = 0
    """The requests that have a result; one with an error does not count."""
    left: int | None = None
    """Requests that a run would compute; of a complete job none."""
    bundles: int | None = None
    """The bundles of the last plan."""
    parts: int
    """Result parts."""
    bytes: int
    """The bytes of the work folder."""
    not_counted: str | None = None
    """Why requests and answers could not be counted; None: they were, or nothing is staged."""
    running: str | None = None
    """The run that works on it, by its lease; None: none, or it has surely ended."""
    last_write: datetime
    last_error: LastError | None = None
    output_uri: str
    work_uri: str


def job_statuses(uri: str, storage: StorageOptions) -> list[JobStatus]:
    """The jobs of a sink, or that of a work folder; the newest first.

    Raises:
        TerminalError: there is none, or it is not as this version writes it.
        TransientError: the store does not answer.
    """
    return [job_status(work) for work in find_work_folders(uri, storage)]


def job_status(work: Store) -> JobStatus:
    """How far the job of a work folder is."""
    owner = job_folder(work)
    objects = work.stored_objects()
    names = {one.path for one in objects}
    staged = read_record(StageSummary, work, STAGED_SUMMARY, only_looks=True)
    if staged is not None and not names.issuperset(part.name for part in staged.parts):
        staged = None
    planned = read_record(PlanSummary, work, PLAN_SUMMARY, only_looks=True)
    manifest = owner.manifest()
    lease = read_lease(work)
    requests, answered, not_counted = _counted(work, staged)
    left = None if requests is None else requests - answered
    if manifest is not None or REPORT_FILE in names:
        left = 0
    return JobStatus(
        job_id=owner.job_id,
        job_name=owner.job_name,
        complete=manifest is not None,
        replaced=manifest is None and REPORT_FILE in names,
        rows=manifest.rows if manifest is not None else staged.rows if staged is not None else None,
        error_rows=manifest.error_rows if manifest is not None else {} if staged is None else staged.error_rows,
        requests=requests,
        answered=answered,
        not_counted=not_counted,
        left=left,
        bundles=None if planned is None else len(planned.bundles),
        parts=sum(name.startswith(f"{RESULTS_FOLDER}/") for name in names),
        bytes=sum(one.size for one in objects),
        running=None if lease is None or is_surely_gone(lease.process) else lease.holder(),
        last_write=datetime.fromtimestamp(max(one.modified for one in objects), UTC),
        last_error=read_last_error(work),
        output_uri=owner.sink.uri,
        work_uri=work.uri,
    )


def _counted(work: Store, staged: StageSummary | None) -> tuple[int | None, int, str | None]:
    """Requests, answers, and why they could not be counted: one folder must not hide the others of a sink."""
    if staged is None:
        return None, 0, None
    try:
        return *count_requests(work, staged), None
    except TerminalError as error:
        return None, 0, error.message


def status_text(status: JobStatus) -> str:
    """The status in a few lines for a person."""
    lines = [
        f"{status.job_name}: {_state(status)} (job {status.job_id})",
        f"  staged     {_staged(status)}",
        f"  planned    {'no' if status.bundles is None else counted(status.bundles, 'bundle')}",
        f"  answered   {_answered(status)}",
        f"  output     {status.output_uri}",
        f"  work       {status.work_uri}",
        f"             {size_text(status.bytes)}, last written {status.last_write:%Y-%m-%d %H:%M:%S} UTC",
    ]
    if status.running is not None:
        lines.insert(1, f"  running    {status.running}")
    if status.not_counted is not None:
        lines.append(f"  not counted: {status.not_counted}")
    if status.last_error is not None:
        error = status.last_error
        lines.append(f"  last error {error.time:%Y-%m-%d %H:%M:%S} UTC, {error.kind}: {error.message}")
    return "\n".join(lines)


def _state(status: JobStatus) -> str:
    if status.complete:
        return "complete"
    return "completed, its output was replaced or removed since" if status.replaced else "not complete"


def _staged(status: JobStatus) -> str:
    if status.rows is None:
        return "no"
    errors = ", ".join(f"{count:,} {code}" for code, count in status.error_rows.items()) or "no errors"
    return f"{counted(status.rows, 'row')}, {errors}"


def _answered(status: JobStatus) -> str:
    parts = f"in {counted(status.parts, 'part')}"
    if status.not_counted is not None:
        return f"not counted, {parts}"
    if status.requests is None:
        return "the work folder was cleaned" if status.complete else f"0 requests {parts}"
    return f"{status.answered:,} of {counted(status.requests, 'request')} {parts}, {status.left:,} left"
