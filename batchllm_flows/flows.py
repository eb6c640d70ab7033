"""The flows: stage, plan, execute every bundle, merge; usable as deployments, as subflows, or called."""

# No `from __future__ import annotations` here: it breaks `serve` of an imported flow (Prefect 3.7).
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Thread
from typing import Any, TypeVar, cast

from prefect import flow, get_run_logger, unmapped
from prefect.artifacts import create_markdown_artifact
from prefect.futures import as_completed
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

from batchllm_flows.engine_status import EngineStatus
from batchllm_flows.job import BatchJob
from batchllm_flows.last_error import remembered_failure
from batchllm_flows.live import LiveProgress
from batchllm_flows.outcome import plan_line, report_line
from batchllm_flows.planning import (
    PlanCall,
    kept_calibrations,
    only_shown,
    plan_job,
    plan_run,
    stage_run,
    usd_per_engine_hour,
)
from batchllm_flows.report import ExecutedPlan, JobOutline, JobReport, build_report, read_samples
from batchllm_flows.report_text import report_markdown
from batchllm_flows.run import JobRun, StepClock, open_run
from batchllm_operators.cost import Calibration, engine_seconds
from batchllm_operators.errors import BatchLLMError, TerminalError
from batchllm_operators.execute.calibration import calibration_budget
from batchllm_operators.execute.pool import THREADS_PER_ENGINE, EnginePool
from batchllm_operators.execute.progress import ProgressBoard
from batchllm_operators.execute.task import calibrate_engine, execute_bundle
from batchllm_operators.merge.task import merge
from batchllm_operators.plan.block_size import planned_block_size
from batchllm_operators.plan.hardware_rates import default_rates
from batchllm_operators.plan.markdown import explain_attention
from batchllm_operators.plan.shared_attention import engine_attention
from batchllm_operators.plan.task import plan
from batchllm_operators.plan.unanswered import has_requests_left
from batchllm_operators.records import BundleResult, PlanSummary, StageSummary
from batchllm_operators.stage.task import stage
from batchllm_operators.svg import markdown_image
from batchllm_operators.wording import artifact_slug, counted
from batchllm_operators.work.damage import quarantined
from batchllm_operators.work.json_objects import write_record
from batchllm_operators.work.layout import REPORT_FILE, REPORT_PAGE

Result = TypeVar("Result", JobReport, PlanSummary)


@flow(name="batch-inference", flow_run_name="{job.name}", validate_parameters=True)
def batch_inference(job: BatchJob, retry_errors: bool = False) -> JobReport:
    """Answer every row of the job's source and write the answers to its sink.

    A job whose output is complete already is not computed again; one that was interrupted computes what is missing.

    Args:
        job: the job.
        retry_errors: a complete output in which rows have an engine's error is opened again: their requests are
            computed, and the output is written with the answers they get now.

    Raises:
        TerminalError: the job cannot succeed as it stands.
        TransientError: an engine or the store failed more often than `execution.retries` allows; run again to go on.
    """
    logger = get_run_logger()
    clock = StepClock()
    run = open_run(job, retry_errors=retry_errors)
    if run.complete is not None:
        logger.info("job %s: the output at %s is complete already, nothing to compute", run.job_id, run.sink.uri)
        with only_shown(logger.warning):
            _show_report(run.complete)
        return _completed(run.complete, report_line(run.complete))
    logger.info("job %s: %s, work folder %s", run.job_id, counted(len(run.objects), "input object"), run.work.uri)
    with remembered_failure(run.work, logger.warning):
        report = _compute(run, clock)
    return _completed(report, report_line(report))


@flow(name="plan-batch-inference", flow_run_name="{job.name}", validate_parameters=True)
def plan_batch_inference(job: BatchJob) -> PlanSummary:
    """Stage and plan the job, and stop before any engine second is spent.

    The work is not lost: `batch_inference` of the same job finds the staged rows.
    """
    planned = plan_job(job, stage=stage, plan=_plan_task(job), warn=get_run_logger().warning)
    return _completed(planned, plan_line(planned))


def _completed(result: Result, message: str) -> Result:
    """The result, for whoever calls the flow, with the message that its run shows."""
    # Prefect takes a state for the one to end in, and returns its data.
    return cast(Result, Completed(message=message, data=result))


def _compute(run: JobRun, clock: StepClock) -> JobReport:
    """The steps of a run, one after the other."""
    job, logger = run.job, get_run_logger()
    with _engines(run) as (pool, status):
        pool.start()
        with clock.step("stage"):
            staged = stage_run(run, stage.with_options(task_run_name=f"stage {counted(len(run.objects), 'object')}"))
        with clock.step("plan"):
            ahead = _plan_ahead(run, staged)
        attention = None if ahead is None else ahead.attention
        pool.choose_attention(attention)
        kept = _kept_rates(run)
        with clock.step("execute"):
            calibrated = _calibrate(run, staged, pool)
        pilot = job.planning.pilot_fraction > 0
        plan_now = partial(plan_run, run, staged, calibrated, _plan_task(job), attention=attention)
        with clock.step("plan"):
            planned = ahead if ahead is not None and not pilot and calibrated == kept else plan_now(pilot=pilot)
        with clock.step("execute"):
            executed = [ExecutedPlan(planned, _execute(run, planned, pool, status))]
        if planned.pilot:
            with clock.step("plan"):
                planned = plan_now()
            with clock.step("execute"):
                executed.append(ExecutedPlan(planned, _execute(run, planned, pool, status)))
        pool.release()
        if calibrated is not None:
            kept_calibrations(run).hold_against(calibrated, [result for one in executed for result in one.results])
        with clock.step("merge"):
            manifest = merge(
                job.source,
                staged,
                job.sink,
                run.work.uri,
                job_id=run.job_id,
                job_name=job.name,
                fingerprint=run.objects,
                max_error_fraction=job.execution.max_error_fraction,
                rewrite=run.reopened,
            )
        report = build_report(
            manifest,
            executed,
            clock.seconds(),
            started=clock.started_at,
            engines=min(job.execution.engines, sum(len(one.results) for one in executed)),
            engine_load_seconds=pool.load_seconds,
            output_uri=run.sink.uri,
            work_uri=run.work.uri,
            usd_per_engine_hour=usd_per_engine_hour(job),
            engine_settings=pool.settings,
            outline=JobOutline.of(job, len(run.objects), staged.left_out_text()),
            samples=read_samples(run.work),
            set_aside=quarantined(run.work),
        )
        write_record(run.work, REPORT_FILE, report)
        with only_shown(logger.warning):
            _show_report(report, _write_page(run, report, executed))
    return report


def _plan_task(job: BatchJob) -> PlanCall:
    """The task of the plan step, whose artifact is named after the job."""
    return partial(plan, job_name=job.name)


def _plan_ahead(run: JobRun, staged: StageSummary) -> PlanSummary | None:
    """The plan by the rates that are known before engines load, where the job leaves the choice of attention to it.

    For other jobs None: their engines load beside the planning.
    """
    engine = engine_attention(run.job.model, run.job.execution)
    if engine is None or not has_requests_left(run.work, staged):
        return None
    planned = plan_run(run, staged, _kept_rates(run), _plan_task(run.job), attention=engine)
    if planned.attention is not None:
        get_run_logger().info("%s", explain_attention(planned.attention))
    return planned


def _kept_rates(run: JobRun) -> Calibration | None:
    """What engines have measured in earlier runs; None also where the job gives the rates itself."""
    return None if run.job.planning.cost is not None else kept_calibrations(run).latest()


def _calibrate(run: JobRun, staged: StageSummary, pool: EnginePool) -> Calibration | None:
    """The engines' rates as kept; else as an engine measures them now, where the job is long enough to be worth it.

    Where it has something to compute and need not measure, its model begins to load beside the planning.
    """
    job = run.job
    cache = kept_calibrations(run)
    kept = _kept_rates(run)
    if not has_requests_left(run.work, staged):
        return kept
    if kept is not None or job.planning.cost is not None or not job.execution.calibrate:
        pool.preload()
        return kept
    default = default_rates(job.model, job.execution)
    # No sharing, and every answer as long as it may be: what is known before there is a plan.
    forecast = engine_seconds(
        default,
        requests=staged.requests,
        prompt_tokens=staged.prompt_tokens,
        computed_tokens=staged.prompt_tokens,
        output_tokens=staged.requests * job.sampling.max_tokens,
    )
    whole_job = forecast / job.execution.engines
    seconds = calibration_budget(whole_job)
    if seconds is None:
        get_run_logger().info("no calibration: by the hardware's default rates the whole job takes %.0f s", whole_job)
        pool.preload()
        return None
    return calibrate_engine.with_options(retries=job.execution.retries)(pool, cache, seconds, default)


@contextmanager
def _engines(run: JobRun) -> Iterator[tuple[EnginePool, EngineStatus]]:
    """The engines of this run, warm until it ends, and what they do until their first tokens, which the log tells."""
    job, logger = run.job, get_run_logger()
    with EngineStatus(logger.info) as status:
        pool = EnginePool(
            model=job.model,
            execution=job.execution,
            block_size=planned_block_size(job.planning),
            sampling=job.sampling,
            work=run.work,
            on_status=status.tell,
        )
        try:
            with pool:
                yield pool, status
        finally:
            if pool.kept_logs:
                logger.error("the end of the engine's log is kept: %s", ", ".join(pool.kept_logs))


def _execute(run: JobRun, planned: PlanSummary, pool: EnginePool, status: EngineStatus) -> tuple[BundleResult, ...]:
    """One task run per bundle, each in a thread that waits for its engine.

    Where this fails the pool closes before the task runner: closing ends the calls that the runner's threads wait in,
    which Prefect cannot interrupt (Ctrl-C, cancellation, a failed bundle).
    """
    if not planned.bundles:
        return ()
    # Drawing the page loads matplotlib, which there is time for while engines work.
    Thread(target=_load_page, name="report-page", daemon=True).start()
    board = ProgressBoard(planned.bundles)
    bundle_task = execute_bundle.with_options(retries=run.job.execution.retries)
    with (
        ThreadPoolTaskRunner[Any](
            max_workers=min(THREADS_PER_ENGINE * run.job.execution.engines, len(planned.bundles))
        ) as runner,
        _closed_on_failure(pool),
        LiveProgress(board, f"{artifact_slug(run.job.name)}-progress", status=status),
    ):
        futures = runner.map(
            bundle_task,
            {
                "bundle": list(planned.bundles),
                "pool": unmapped(pool),
                "on_progress": unmapped(board.update),
                "number": list(range(1, len(planned.bundles) + 1)),
                "bundles": unmapped(len(planned.bundles)),
            },
        )
        results: list[BundleResult] = []
        failed: BatchLLMError | None = None
        for future in as_completed(list(futures)):
            try:
                results.append(cast(BundleResult, future.result()))
            except TerminalError:
                raise
            except BatchLLMError as error:
                # The other bundles go on: what they finish need not be computed again.
                failed = error
        if failed is not None:
            raise failed
        return tuple(results)


@contextmanager
def _closed_on_failure(pool: EnginePool) -> Iterator[None]:
    try:
        yield
    except BaseException:
        pool.close(failed=True)
        raise


def _write_page(run: JobRun, report: JobReport, executed: list[ExecutedPlan]) -> list[str]:
    """Write the page of a run; returns the plots of its facts, as lines of Markdown."""
    # Imported here: drawing loads matplotlib, which a run needs only at its end.
    from batchllm_flows.html_report.attention_trace import read_attention_trace
    from batchllm_flows.html_report.page import report_page
    from batchllm_flows.html_report.plots import report_plots
    from batchllm_flows.html_report.step_trace import read_step_trace

    since = report.started.timestamp()
    trace, notes = read_step_trace(run.work, since=since)
    attention, attention_notes = read_attention_trace(run.work, since=since)
    plots = report_plots(report, executed, trace)
    page = report_page(report, executed[-1].plan, plots, trace, attention, [*notes, *attention_notes])
    run.work.write_bytes(REPORT_PAGE, page.encode())
    return [
        *markdown_image("Savings", plots.saving),
        *markdown_image("Each bundle against its forecast", plots.bundles),
        *markdown_image("Steps of the engines", plots.engine_steps),
    ]


def _load_page() -> None:
    import batchllm_flows.html_report.page  # noqa: F401


def _show_report(report: JobReport, images: Sequence[str] = ()) -> None:
    create_markdown_artifact(
        "\n".join([report_markdown(report), *images]),
        key=f"{artifact_slug(report.job_name)}-report",
        description="Report of the run",
    )
