"""Staging and planning of a job: the sequence that the flows and the command line share. Needs no Prefect."""

from __future__ import annotations

import logging
from collections.abc import Callable

from batchllm_flows.job import BatchJob
from batchllm_flows.publish import Warn, publish_plan
from batchllm_flows.reuse import take_answers
from batchllm_flows.run import JobRun, open_run
from batchllm_flows.work_lease import refuse_while_another_runs
from batchllm_operators.cost import Calibration, engine_seconds
from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.calibration_cache import CalibrationCache
from batchllm_operators.execute.engine_work import EngineWork
from batchllm_operators.execute.messages import Load
from batchllm_operators.plan.block_size import planned_block_size
from batchllm_operators.plan.hardware_rates import default_rates
from batchllm_operators.plan.shared_attention import EngineAttention, engine_attention
from batchllm_operators.plan.step import plan_staged
from batchllm_operators.records import AttentionForecast, PlanSummary, StageSummary
from batchllm_operators.row_errors import refuse_too_many_errors
from batchllm_operators.specs.planning import CostModel
from batchllm_operators.stage.step import stage_source
from batchllm_operators.work.layout import CALIBRATIONS_FOLDER

StageCall = Callable[..., StageSummary]
"""`stage_source`, or the Prefect task around it."""
PlanCall = Callable[..., PlanSummary]
"""`plan_staged`, or the Prefect task around it."""

_LOGGER = logging.getLogger(__name__)


def plan_job(
    job: BatchJob,
    *,
    stage: StageCall = stage_source,
    plan: PlanCall = plan_staged,
    warn: Warn = _LOGGER.warning,
) -> PlanSummary:
    """Stage and plan a job; no engine is loaded. What is staged is found by a later run of the job.

    Args:
        job: the job.
        stage: does the stage step.
        plan: does the plan step.
        warn: takes a warning, as `logging.Logger.warning`.

    Raises:
        TerminalError: the job cannot succeed as it stands, or more rows have errors than it allows.
        TransientError: the store does not answer, or a run of this job is under way.
    """
    run = open_run(job)
    if not run.objects:
        raise TerminalError("source.new_objects_only: no object is new, there is nothing to plan", uri=job.source.uri)
    refuse_while_another_runs(run.work)
    staged, calibrated = stage_run(run, stage), kept_calibrations(run).latest()
    take_answers(run, staged)
    planned = plan_run(run, staged, calibrated, plan, attention=engine_attention(job.model, job.execution))
    return publish_plan(run.work, planned, job.name, warn)


def stage_run(run: JobRun, stage: StageCall) -> StageSummary:
    """Stage the rows of a run.

    Raises:
        TerminalError: more rows have errors than the job allows: no engine would change that.
    """
    job = run.job
    staged = stage(
        job.source,
        job.prompt,
        job.sampling,
        job.model,
        run.work.uri,
        job.sink.storage,
        field_order=job.planning.field_order,
        tokenizer_processes=job.execution.tokenizer_processes,
        fingerprint=run.objects,
        output_prefix=job.sink.prefix,
        task_name=job.task,
    )
    refuse_too_many_errors(staged.error_rows, staged.rows, job.execution.max_error_fraction, staged.error_examples)
    return staged


def plan_run(
    run: JobRun,
    staged: StageSummary,
    calibrated: Calibration | None,
    plan: PlanCall,
    *,
    pilot: bool = False,
    attention: EngineAttention | AttentionForecast | None = None,
) -> PlanSummary:
    """Plan what remains of a run.

    Args:
        run: the run.
        staged: what staging found.
        calibrated: measured rates of an engine.
        plan: does the plan step.
        pilot: plan a sample first.
        attention: of the engines, where the job leaves its choice to the plan; or the forecast it was chosen by.
    """
    job = run.job
    return plan(
        staged,
        job.planning,
        run.work.uri,
        job.sink.storage,
        engines=job.execution.engines,
        calibrated=calibrated,
        default=None if calibrated or job.planning.cost else default_rates(job.model, job.execution),
        usd_per_engine_hour=usd_per_engine_hour(job),
        pilot=pilot,
        attention=attention,
    )


def kept_calibrations(run: JobRun) -> CalibrationCache:
    """Kept beside the output, for every job that writes there."""
    return CalibrationCache(
        run.sink.folder(CALIBRATIONS_FOLDER),
        run.job.model,
        block_size=planned_block_size(run.job.planning),
        gpus_per_engine=run.job.execution.gpus_per_engine,
    )


def engine_work(run: JobRun) -> EngineWork:
    """What the engines of a run are to do, before its plan has a say."""
    job = run.job
    return EngineWork(
        execution=job.execution,
        load=Load(
            model=job.model,
            block_size=planned_block_size(job.planning),
            gpus=job.execution.gpus_per_engine,
            task=job.task,
        ),
        sampling=job.sampling.parameters,
        work_uri=run.work.uri,
        storage=run.work.options,
    )


def usd_per_engine_hour(job: BatchJob) -> float | None:
    """Price of one engine; None: not known."""
    price = job.execution.usd_per_gpu_hour
    return None if price is None else price * job.execution.gpus_per_engine


def longest_forecast(job: BatchJob, staged: StageSummary, default: CostModel) -> float:
    """Seconds of the whole job where nothing is shared and every answer is as long as it may be.

    That is what is known before there is a plan.
    """
    return (
        engine_seconds(
            default,
            requests=staged.requests,
            prompt_tokens=staged.prompt_tokens,
            computed_tokens=staged.prompt_tokens,
            output_tokens=staged.requests * job.sampling.max_tokens,
        )
        / job.execution.engines
    )
