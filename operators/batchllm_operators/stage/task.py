"""The stage step as a Prefect task."""

# No `from __future__ import annotations` here: it breaks `serve` of an imported flow (Prefect 3.7).
from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from batchllm_operators.records import InputObject, StageSummary
from batchllm_operators.retry import RETRIES, RETRY_DELAYS_SECONDS, retry_transient
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.planning import FieldOrderChoice
from batchllm_operators.specs.sampling import SamplingSpec
from batchllm_operators.specs.source import PromptSpec, SourceSpec
from batchllm_operators.stage.step import stage_source
from batchllm_operators.task_names import GENERATE


@task(
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_condition_fn=retry_transient,
)
def stage(
    source: SourceSpec,
    prompt: PromptSpec,
    sampling: SamplingSpec,
    model: ModelSpec,
    work_uri: str,
    storage: StorageOptions,
    field_order: FieldOrderChoice = "optimise",
    tokenizer_processes: int = 1,
    fingerprint: Sequence[InputObject] | None = None,
    output_prefix: str = "",
    task_name: str = GENERATE,
) -> StageSummary:
    """Turn every input row into a request, or an error that says why not; written to `staged/` of the work folder.

    Args:
        source: where the rows are.
        prompt: how a row becomes a prompt.
        sampling: how completions are sampled.
        model: the model that will answer.
        work_uri: the work folder.
        storage: how to reach the work folder.
        field_order: of a prompt of kind `fields`.
        tokenizer_processes: processes that render and tokenise.
        fingerprint: the input objects as they were when the job began; default: as they are now.
        output_prefix: of the names of the output columns.
        task_name: what the model will do with each prompt.

    Raises:
        TerminalError: see `stage_rows`.
        TransientError: after the retries.
    """
    return stage_source(
        source,
        prompt,
        sampling,
        model,
        work_uri,
        storage,
        field_order=field_order,
        tokenizer_processes=tokenizer_processes,
        fingerprint=fingerprint,
        output_prefix=output_prefix,
        task_name=task_name,
        log=get_run_logger().info,
    )
