"""The input of a run: all objects of its source, or those that are new since the last complete run."""

from __future__ import annotations

from batchllm_flows.job import BatchJob
from batchllm_flows.report import JobReport, load_report
from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import find_objects
from batchllm_operators.formats.input_objects import FoundInput
from batchllm_operators.merge.seen_inputs import seen_inputs
from batchllm_operators.merge.sink import newest_added_manifest, work_of_output
from batchllm_operators.store import Store


def input_of(job: BatchJob) -> FoundInput:
    """The objects that a run of the job reads now; none, where `source.new_objects_only` finds no new one.

    Raises:
        TerminalError: no object matches, no access, or a manifest of the sink is damaged.
    """
    found = find_objects(job.source)
    if not job.source.new_objects_only:
        return found
    seen = seen_inputs(job.sink_store(), job.name)
    return found.only({one.path for one in found.objects if (found.store.uri_of(one.path), one.version) not in seen})


def last_report(job: BatchJob) -> tuple[Store, JobReport]:
    """Work folder and report of the last run of a job of this name that added its output to the sink.

    Raises:
        TerminalError: the report is gone.
    """
    sink = job.sink_store()
    manifest = newest_added_manifest(sink, job.name)
    if manifest is None:
        raise TerminalError("source.new_objects_only: the outputs of earlier runs are gone meanwhile", uri=sink.uri)
    work = work_of_output(sink, manifest)
    return work, load_report(work)
