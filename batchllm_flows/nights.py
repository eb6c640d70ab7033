"""A job that runs night after night, and catches up on the nights that were missed."""

# No `from __future__ import annotations` here: it breaks `serve` of an imported flow (Prefect 3.7).
import datetime
from typing import cast

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed

from batchllm_flows.dates import dated_job, moment_of
from batchllm_flows.flows import batch_inference
from batchllm_flows.job import BatchJob, InvalidJobError
from batchllm_flows.report import JobReport
from batchllm_operators.errors import BatchLLMError, NoInputError
from batchllm_operators.wording import counted


@flow(name="nightly-inference", flow_run_name="{job.name}", validate_parameters=True)
def nightly_inference(
    job: BatchJob, catch_up_days: int = 0, date: datetime.date | None = None
) -> dict[datetime.date, JobReport]:
    """Answer the rows of a night, and those of earlier nights that have no complete output, or new input since.

    Each night is a subflow of its own, the asked one first. One that fails stops no other; this flow fails in the end.

    Args:
        job: the job, with `{date}` or `{scheduled}` in its source.
        catch_up_days: earlier nights to look after; one without any input is left out.
        date: the night; default: the day that the flow run was scheduled for.

    Returns:
        The report of each night that has input.

    Raises:
        InvalidJobError: all nights would read the same rows, or write to the same place.
        TerminalError: a night failed, and the error of each is in the log; or there is no input for the asked night.
        TransientError: as before, where running again may help.
    """
    _refuse_equal_nights(job, catch_up_days)
    logger = get_run_logger()
    asked = flow_run.scheduled_start_time.astimezone(datetime.UTC).date() if date is None else date
    reports: dict[datetime.date, JobReport] = {}
    failures: dict[datetime.date, BatchLLMError] = {}
    for days in range(catch_up_days + 1):
        night = asked - datetime.timedelta(days=days)
        try:
            reports[night] = batch_inference(job, date=night)
        except BatchLLMError as error:
            if days and isinstance(error, NoInputError):
                logger.info("night of %s: no input, left out", night)
                continue
            logger.warning("night of %s failed, the others go on: %s", night, error)
            failures[night] = error
    if failures:
        raise _told_together(failures)
    computed = sum(not report.already_complete for report in reports.values())
    # Prefect takes a state for the one to end in, and returns its data.
    message = f"{counted(computed, 'night')} computed, of {len(reports)}"
    return cast(dict[datetime.date, JobReport], Completed(message=message, data=reports))


def _refuse_equal_nights(job: BatchJob, catch_up_days: int) -> None:
    if catch_up_days < 0:
        raise InvalidJobError(f"catch_up_days: expected 0 or more, got {catch_up_days}")
    one, other = (dated_job(job, moment_of(datetime.date(2000, 1, day))) for day in (1, 2))
    if (one.source.uri, one.source.filter) == (other.source.uri, other.source.filter):
        raise InvalidJobError("source: expected a date such as {date} in source.uri or source.filter, got none")
    if catch_up_days and not job.sink.adds and one.sink.uri == other.sink.uri:
        raise InvalidJobError(
            "sink: expected a place of its own for each night, a date such as {date} in sink.uri or sink.mode append"
            f" or partition, got {job.sink.uri!r} in mode {job.sink.mode!r}"
        )


def _told_together(failures: dict[datetime.date, BatchLLMError]) -> BatchLLMError:
    """The error of the only night that failed, or one of the same class as the first that names all of them."""
    first = next(iter(failures.values()))
    if len(failures) == 1:
        return first
    nights = "; ".join(f"{night}: {error.message}" for night, error in failures.items())
    return type(first)(f"{counted(len(failures), 'night')} failed: {nights}")
