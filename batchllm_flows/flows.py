"""The flows: stage, plan, execute every bundle, merge; usable as deployments, as subflows, or called."""

# No `from __future__ import annotations` here: it breaks `serve` of an imported flow (Prefect 3.7).
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from prefect import flow, get_run_logger, unmapped
from prefect.artifacts import create_markdown_artifact
from prefect.futures import as_completed
from prefect.task_runners import ThreadPoolTaskRunner

from batchllm_flows.job import BatchJob
from batchllm_flows.live import LiveProgress
from batchllm_flows.report import JobReport, build_report, report_markdown
from batchllm_flows.run import JobRun, StepClock, open_run
from batchllm_operators.errors import BatchLLMError, TerminalError
from batchllm_operators.execute.pool import EnginePool
from batchllm_operators.execute.progress import ProgressBoard
from batchllm_operators.execute.task import execute_bundle
from batchllm_operators.merge.task import merge
from batchllm_operators.plan.task import plan
from batchllm_operators.records import REPORT_FILE, BundleResult, PlanSummary, StageSummary
from batchllm_operators.stage.task import stage


@flow(name="batch-inference", flow_run_name="{job.name}", validate_parameters=True)
def batch_inference(job: BatchJob) -> JobReport:
    """Answer every row of the job's source and write the answers to its sink.

    A job whose output is complete already is not computed again; one that was interrupted computes what is missing.

    Raises:
        TerminalError: the job cannot succeed as it stands.
        TransientError: an engine or the store failed more often than `execution.retries` allows; run again to go on.
    """
    logger = get_run_logger()
    clock = StepClock()
    run = open_run(job)
    if run.complete is not None:
        logger.info("job %s: the output at %s is complete already, nothing to compute", run.job_id, run.sink.uri)
        _publish(run.complete)
        return run.complete
    logger.info("job %s: %d input objects, work folder %s", run.job_id, len(run.objects), run.work.uri)
    with clock.step("stage"):
        staged = _stage(run)
    with _engine_pool(run) as pool:
        with clock.step("plan"):
            planned = _plan(run, staged, pilot=job.planning.pilot_fraction > 0)
        with clock.step("execute"):
            results = _execute(run, planned, pool)
        if planned.pilot:
            with clock.step("plan"):
                planned = _plan(run, staged)
            with clock.step("execute"):
                results += _execute(run, planned, pool)
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
        )
    report = build_report(
        manifest,
        planned,
        results,
        clock.seconds(),
        engines=min(job.execution.engines, len(results)),
        output_uri=run.sink.uri,
        work_uri=run.work.uri,
    )
    run.work.write_bytes(REPORT_FILE, report.model_dump_json(indent=2).encode())
    _publish(report)
    return report


@flow(name="plan-batch-inference", flow_run_name="{job.name}", validate_parameters=True)
def plan_batch_inference(job: BatchJob) -> PlanSummary:
    """Stage and plan the job, and stop before any engine second is spent.

    The work is not lost: `batch_inference` of the same job finds the staged rows.
    """
    run = open_run(job)
    staged = _stage(run)
    return _plan(run, staged)


def _stage(run: JobRun) -> StageSummary:
    job = run.job
    return stage(
        job.source,
        job.prompt,
        job.sampling,
        job.model,
        run.work.uri,
        job.sink.storage,
        tokenizer_processes=job.execution.tokenizer_processes,
    )


def _plan(run: JobRun, staged: StageSummary, *, pilot: bool = False) -> PlanSummary:
    job, price = run.job, run.job.execution.usd_per_gpu_hour
    return plan(
        staged,
        job.planning,
        run.work.uri,
        job.sink.storage,
        workers=job.execution.engines,
        usd_per_worker_hour=None if price is None else price * job.execution.gpus_per_engine,
        pilot=pilot,
    )


def _engine_pool(run: JobRun) -> EnginePool:
    """The engines of this run: started by the first bundles, and warm until the run ends."""
    job = run.job
    return EnginePool(
        model=job.model,
        execution=job.execution,
        block_size=job.planning.block_size,
        sampling=job.sampling,
        work=run.work,
    )


def _execute(run: JobRun, planned: PlanSummary, pool: EnginePool) -> list[BundleResult]:
    """One task run per bundle, one thread per engine.

    Where this fails the pool closes before the task runner: closing ends the calls that the runner's threads wait in,
    which Prefect cannot interrupt (Ctrl-C, cancellation, a failed bundle).
    """
    if not planned.bundles:
        return []
    board = ProgressBoard(planned.bundles)
    bundle_task = execute_bundle.with_options(retries=run.job.execution.retries)
    with (
        ThreadPoolTaskRunner[Any](max_workers=min(run.job.execution.engines, len(planned.bundles))) as runner,
        _closed_on_failure(pool),
        LiveProgress(board, f"{artifact_slug(run.job.name)}-progress"),
    ):
        futures = runner.map(
            bundle_task,
            {"bundle": list(planned.bundles), "pool": unmapped(pool), "on_progress": unmapped(board.update)},
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
        return results


@contextmanager
def _closed_on_failure(pool: EnginePool) -> Iterator[None]:
    try:
        yield
    except BaseException:
        pool.close()
        raise


def _publish(report: JobReport) -> None:
    create_markdown_artifact(
        report_markdown(report), key=f"{artifact_slug(report.job_name)}-report", description="Report of the run"
    )


def artifact_slug(name: str) -> str:
    """The name in the characters Prefect allows in artifact keys: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "batch-inference"
