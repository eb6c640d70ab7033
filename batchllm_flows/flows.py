"""The flows: stage, plan, execute every bundle, merge; usable as deployments, as subflows, or called."""

# No `from __future__ import annotations` here: it breaks `serve` of an imported flow (Prefect 3.7).
import datetime
from collections.abc import Sequence
from functools import partial
from typing import TypeVar, cast

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed

from batchllm_flows.dates import dated_job, moment_of
from batchllm_flows.engine_status import EngineStatus
from batchllm_flows.job import BatchJob
from batchllm_flows.last_error import remembered_failure
from batchllm_flows.live import LiveProgress
from batchllm_flows.outcome import plan_line, report_line
from batchllm_flows.planning import (
    PlanCall,
    engine_work,
    kept_calibrations,
    longest_forecast,
    plan_job,
    plan_run,
    stage_run,
    usd_per_engine_hour,
)
from batchllm_flows.prefect_server import reported_when_server_is_back
from batchllm_flows.publish import load_page_ahead, publish_earlier_run, publish_run
from batchllm_flows.report import ExecutedPlan, JobOutline, JobReport, build_report, read_samples
from batchllm_flows.reuse import leave_answers, take_answers
from batchllm_flows.run import JobRun, StepClock, open_run
from batchllm_flows.terminations import ended_by_exit
from batchllm_flows.work_lease import WorkLease, clear_after_killed_run
from batchllm_operators.cost import Calibration
from batchllm_operators.execute.dispatch import measured_rates, open_engines, run_bundles
from batchllm_operators.execute.engine_work import EngineWork
from batchllm_operators.execute.fleet import EngineFleet
from batchllm_operators.merge.task import merge
from batchllm_operators.plan.hardware_rates import default_rates
from batchllm_operators.plan.markdown import explain_attention
from batchllm_operators.plan.shared_attention import engine_attention
from batchllm_operators.plan.task import plan
from batchllm_operators.plan.unanswered import has_requests_left
from batchllm_operators.records import BundleResult, Manifest, PlanSummary, StageSummary
from batchllm_operators.stage.task import stage
from batchllm_operators.storage_retries import storage_retries
from batchllm_operators.tasks import task_named
from batchllm_operators.wording import artifact_slug, counted
from batchllm_operators.work.damage import quarantined
from batchllm_operators.work.json_objects import write_record
from batchllm_operators.work.layout import REPORT_FILE

Result = TypeVar("Result", JobReport, PlanSummary)


@flow(name="batch-inference", flow_run_name="{job.name}", validate_parameters=True)
def batch_inference(job: BatchJob, retry_errors: bool = False, date: datetime.date | None = None) -> JobReport:
    """Answer every row of the job's source and write the answers to its sink.

    A job whose output is complete already is not computed again; one that was interrupted computes what is missing.

    Args:
        job: the job.
        retry_errors: a complete output in which rows have an engine's error is opened again: their requests are
            computed, and the output is written with the answers they get now.
        date: the day that stands for `{date}` in `source.uri` and `sink.uri`; default: when the flow run was scheduled
            for, so that a night that runs late still is its own.

    Raises:
        TerminalError: the job cannot succeed as it stands.
        TransientError: an engine or the store failed more often than `execution.retries` allows; run again to go on.
    """
    with reported_when_server_is_back(get_run_logger().warning):
        return _answered(_of_its_day(job, date), retry_errors=retry_errors)


@flow(name="plan-batch-inference", flow_run_name="{job.name}", validate_parameters=True)
def plan_batch_inference(job: BatchJob, date: datetime.date | None = None) -> PlanSummary:
    """Stage and plan the job, and stop before any engine second is spent; `date` as for `batch_inference`.

    The work is not lost: `batch_inference` of the same job finds the staged rows.
    """
    logger = get_run_logger()
    with reported_when_server_is_back(logger.warning):
        job = _of_its_day(job, date)
        planned = plan_job(job, stage=stage, plan=_plan_task(job), warn=logger.warning)
        return _completed(planned, plan_line(planned))


def _answered(job: BatchJob, *, retry_errors: bool) -> JobReport:
    """The report of a job with its dates filled in: of this run, or of the one that has completed it before."""
    logger = get_run_logger()
    clock = StepClock()
    run = open_run(job, retry_errors=retry_errors)
    if run.complete is not None:
        return _completed_before(run, run.complete)
    logger.info("job %s: %s, work folder %s", run.job_id, counted(len(run.objects), "input object"), run.work.uri)
    with ended_by_exit(), WorkLease(run.work, job.execution.on_concurrent, flow_run.id, logger.info) as lease:
        if lease.waited:
            run = open_run(job, retry_errors=retry_errors)
            if run.complete is not None:
                return _completed_before(run, run.complete)
        with remembered_failure(run.work, logger.warning):
            report = _compute(run, clock, lease)
    return _completed(report, report_line(report))


def _completed_before(run: JobRun, report: JobReport) -> JobReport:
    """The report of an earlier run, where there is nothing to compute."""
    logger = get_run_logger()
    why = "is complete already" if run.objects else "has the answers to all objects of the source"
    logger.info("job %s: the output at %s %s, nothing to compute", run.job_id, run.sink.uri, why)
    clear_after_killed_run(run.work)
    publish_earlier_run(report, logger.warning)
    return _completed(report, report_line(report))


def _of_its_day(job: BatchJob, day: datetime.date | None) -> BatchJob:
    """The job with its dates filled in, of the day that was asked for or that its flow run was scheduled for."""
    return dated_job(job, flow_run.scheduled_start_time if day is None else moment_of(day))


def _completed(result: Result, message: str) -> Result:
    """The result, for whoever calls the flow, with the message that its run shows."""
    # Prefect takes a state for the one to end in, and returns its data.
    return cast(Result, Completed(message=message, data=result))


def _compute(run: JobRun, clock: StepClock, lease: WorkLease) -> JobReport:
    """The steps of a run, one after the other."""
    job, logger, retries_before = run.job, get_run_logger(), storage_retries()
    with (
        EngineStatus(logger.info) as status,
        open_engines(job.execution, run.work, on_status=status.tell, log_error=logger.error) as fleet,
    ):
        fleet.start()
        with clock.stage:
            staged = stage_run(run, stage.with_options(task_run_name=f"stage {counted(len(run.objects), 'object')}"))
            before = take_answers(run, staged)
        if before.requests:
            logger.info("%s answered by earlier runs", counted(before.requests, "request"))
        executed = _plan_and_execute(run, staged, fleet, status, clock)
        fleet.release()
        with clock.merge:
            lease.require()
            manifest = _merge(run, staged, executed)
            leave_answers(run, logger.warning)
        report = build_report(
            manifest,
            executed,
            clock.seconds(),
            started=clock.started_at,
            engines=min(fleet.engines, sum(len(one.results) for one in executed)),
            output_uri=run.sink.uri,
            work_uri=run.work.uri,
            usd_per_engine_hour=usd_per_engine_hour(job),
            outline=JobOutline.of(job, len(run.objects), staged.left_out_text()),
            samples=read_samples(run.work),
            set_aside=quarantined(run.work),
            storage_retries=storage_retries() - retries_before,
        )
        write_record(run.work, REPORT_FILE, report)
        publish_run(run.work, report, executed, logger.warning)
    return report


def _plan_and_execute(
    run: JobRun, staged: StageSummary, fleet: EngineFleet, status: EngineStatus, clock: StepClock
) -> list[ExecutedPlan]:
    """The plans of a run with what executing them gave: that of a pilot sample first, where the job wants one."""
    kept = _kept_rates(run)
    with clock.plan:
        ahead = _plan_ahead(run, staged, kept)
    attention = None if ahead is None else ahead.attention
    work = engine_work(run).with_attention(attention)
    with clock.execute:
        calibrated = _rates(run, staged, fleet, work, kept)
    plan_now = partial(plan_run, run, staged, calibrated, _plan_task(run.job), attention=attention)
    pilot = run.job.planning.pilot_fraction > 0
    with clock.plan:
        planned = ahead if ahead is not None and not pilot and calibrated == kept else plan_now(pilot=pilot)
    with clock.execute:
        executed = [ExecutedPlan(planned, _execute(run, planned, fleet, work, status))]
    if planned.pilot:
        with clock.plan:
            planned = plan_now()
        with clock.execute:
            results = _execute(run, planned, fleet, work, status, before=executed[0].results)
        executed.append(ExecutedPlan(planned, results))
    if calibrated is not None and task_named(run.job.task).generates:
        kept_calibrations(run).hold_against(calibrated, [result for one in executed for result in one.results])
    return executed


def _merge(run: JobRun, staged: StageSummary, executed: Sequence[ExecutedPlan]) -> Manifest:
    job = run.job
    known_parts = tuple(part for one in executed for result in one.results for part in result.parts)
    return merge(
        job.source,
        staged,
        job.sink,
        run.work.uri,
        job_id=run.job_id,
        job_name=job.name,
        fingerprint=run.objects,
        max_error_fraction=job.execution.max_error_fraction,
        rewrite=run.reopened,
        slice_id=run.slice_id,
        known_parts=known_parts,
    )


def _plan_task(job: BatchJob) -> PlanCall:
    """The task of the plan step, whose artifact is named after the job."""
    return partial(plan, job_name=job.name)


def _plan_ahead(run: JobRun, staged: StageSummary, kept: Calibration | None) -> PlanSummary | None:
    """The plan by the rates that are known before engines load, where the job leaves the choice of attention to it.

    For other jobs None: their engines load beside the planning.
    """
    engine = engine_attention(run.job.model, run.job.execution)
    if engine is None or not has_requests_left(run.work, staged):
        return None
    planned = plan_run(run, staged, kept, _plan_task(run.job), attention=engine)
    if planned.attention is not None:
        get_run_logger().info("%s", explain_attention(planned.attention))
    return planned


def _kept_rates(run: JobRun) -> Calibration | None:
    """What engines have measured in earlier runs; None also where the job gives the rates itself."""
    return None if run.job.planning.cost is not None else kept_calibrations(run).latest()


def _rates(
    run: JobRun, staged: StageSummary, fleet: EngineFleet, work: EngineWork, kept: Calibration | None
) -> Calibration | None:
    """The engines' rates as kept; else as an engine measures them now, where the job is long enough to be worth it.

    Where the run has something to compute and need not measure, its model begins to load beside the planning.
    """
    job = run.job
    if not has_requests_left(run.work, staged):
        return kept
    # The measurement is of generation; a task that generates nothing takes what generation has shown, if it has.
    measures = kept is None and job.planning.cost is None and job.execution.calibrate and task_named(job.task).generates
    if not measures:
        fleet.preload(work.load)
        return kept
    default = default_rates(job.model, job.execution)
    return measured_rates(
        fleet,
        work,
        kept_calibrations(run),
        forecast_seconds=longest_forecast(job, staged, default),
        default=default,
        log=get_run_logger().info,
    )


def _execute(
    run: JobRun,
    planned: PlanSummary,
    fleet: EngineFleet,
    work: EngineWork,
    status: EngineStatus,
    before: Sequence[BundleResult] = (),
) -> tuple[BundleResult, ...]:
    """The bundles of a plan on the engines, shown as they go; `before`: what an earlier plan of this run gave."""
    if planned.bundles:
        load_page_ahead()
    artifact = f"{artifact_slug(run.job.name)}-progress"
    return run_bundles(
        planned.bundles,
        fleet,
        work,
        live=lambda board: LiveProgress(board, artifact, status=status),
        proven=any(result.requests > result.errors for result in before),
    )
