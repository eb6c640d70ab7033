"""The merge step as a Prefect task."""

# No `from __future__ import annotations` here: it breaks `serve` of an imported flow (Prefect 3.7).
from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import task_run

from batchllm_operators.formats import open_source
from batchllm_operators.merge.merging import merge_results
from batchllm_operators.records import InputObject, Manifest, StageSummary
from batchllm_operators.retry import RETRIES, RETRY_DELAYS_SECONDS, retry_transient
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store
from batchllm_operators.wording import counted


def _run_name() -> str:
    parameters: dict[str, Any] = task_run.parameters
    return f"merge {counted(parameters['staged'].rows, 'row')}"


@task(
    task_run_name=_run_name,
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_condition_fn=retry_transient,
)
def merge(
    source: SourceSpec,
    staged: StageSummary,
    sink: SinkSpec,
    work_uri: str,
    *,
    job_id: str,
    job_name: str,
    fingerprint: Sequence[InputObject],
    max_error_fraction: float = 0.05,
    rewrite: bool = False,
    slice_id: str | None = None,
    known_parts: Sequence[str] = (),
) -> Manifest:
    """Join the results in the work folder to the input rows, write the output files, and the manifest last.

    Args:
        source: where the rows are.
        staged: what the stage step returned.
        sink: where the output goes; the work folder is reached by its storage options too.
        work_uri: the work folder.
        job_id: of this job.
        job_name: for the manifest.
        fingerprint: the input objects as they were when the job began.
        max_error_fraction: share of rows without an answer above which there is no output.
        rewrite: write this job's complete output again.
        slice_id: tells the output from others of the sink, where it is added to them.
        known_parts: result parts that this run has seen written.

    Raises:
        TerminalError: see `merge_results`.
        TransientError: after the retries.
    """
    manifest = merge_results(
        open_source(source, only=fingerprint if source.new_objects_only else None),
        staged,
        Store(work_uri, sink.storage),
        Store(sink.uri, sink.storage),
        sink,
        job_id=job_id,
        job_name=job_name,
        fingerprint=fingerprint,
        max_error_fraction=max_error_fraction,
        rewrite=rewrite,
        slice_id=slice_id,
        known_parts=known_parts,
    )
    get_run_logger().info(
        "merged %s into %s at %s", counted(manifest.rows, "row"), counted(len(manifest.files), "file"), sink.uri
    )
    return manifest
