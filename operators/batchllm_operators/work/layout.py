"""Names of the objects of a work folder, `{sink}/_batchllm/{job_id}/` unless the job names another place.

| object | module | written by | read by |
|---|---|---|---|
| `job.json` | `job_file` | a run, before anything else | a run, plan (earlier runs), status, clean, verify |
| `lease.json` | `lease` | a run, from its begin to its end | runs of the same job, status |
| `staged/part-NNNNN.parquet` | `staged` | stage | stage (taken up again), plan, merge, verify |
| `staged/summary.json` | `staged` | stage, behind the parts | stage, status, verify |
| `plan/bundle-NNNNN.parquet` | `bundles` | plan | execute, verify |
| `plan/summary.json` | `bundles` | plan, behind the bundles | status, verify |
| `plan/plan.html` | here | `batchllm plan` | a person |
| `results/part-{uuid}-{digest}.parquet` | `results` | execute | execute (next attempt), plan, merge, verify |
| `reuse.json` | `reuse` | a run, before its plan and at its end | a run, plan |
| `trace/{bundle}-{uuid}.parquet` | `traces` | execute | report page, verify |
| `attention_trace/{bundle}-{uuid}.parquet` | `traces` | execute | report page, verify |
| `logs/engine-{index}.log` | here | execute, where the run fails | a person |
| `samples.json` | here | merge | report |
| `report.json`, `report.html` | here | a run, at its end | a run, `batchllm report`, verify |
| `last_error.json` | here | a run that fails | status |
| `quarantine/...` | `damage` | whoever sets a damaged object aside | report, verify |

Beside the work folders `_batchllm/calibrations/` keeps what engines measured, and `_batchllm/answers/` the answers of
all runs (`batchllm_operators.answers`). `_manifest.json` of the sink says that the output is complete; where outputs
are added to a sink, each has a manifest in `_manifests/`.

A summary is written behind the objects it lists: without it they do not count. Objects of JSON are read and written by
`json_objects`; `damage` says what is done with an object that is not what was written.
"""

from __future__ import annotations

FORMAT_VERSION = 3
"""The version of all objects of a work folder and of the manifest. It counts in the id of every job, so that no job
finds objects of another version in its work folder. Raise it with whatever changes an object, or what a row becomes."""

JOB_FILE = "job.json"
LEASE_FILE = "lease.json"
STAGED_FOLDER = "staged"
STAGED_SUMMARY = "staged/summary.json"
PLAN_FOLDER = "plan"
PLAN_SUMMARY = "plan/summary.json"
PLAN_PAGE = "plan/plan.html"
RESULTS_FOLDER = "results"
QUARANTINE_FOLDER = "quarantine"
TRACE_FOLDER = "trace"
ATTENTION_TRACE_FOLDER = "attention_trace"
LOGS_FOLDER = "logs"
REUSE_FILE = "reuse.json"
SAMPLES_FILE = "samples.json"
REPORT_FILE = "report.json"
REPORT_PAGE = "report.html"
LAST_ERROR_FILE = "last_error.json"


WORK_FOLDER = "_batchllm"
"""The folder of the sink that holds the work folders of its jobs, each under its id."""
ANSWERS_FOLDER = "_batchllm/answers"
"""The folder of the sink that keeps answers for every job that writes there."""
CALIBRATIONS_FOLDER = "_batchllm/calibrations"
"""The folder of the sink that holds calibrations for every job that writes there."""
MANIFEST_FILE = "_manifest.json"
"""The object of the sink whose presence says that the output is complete."""
MANIFESTS_FOLDER = "_manifests"
"""The folder of a sink that outputs are added to: one manifest for each of them."""


def manifest_name(slice_id: str | None) -> str:
    """Name of the manifest of an output in its sink.

    Args:
        slice_id: of an output beside others; None: the sink holds one output.
    """
    return MANIFEST_FILE if slice_id is None else f"{MANIFESTS_FOLDER}/{slice_id}.json"


def engine_log(index: int) -> str:
    """Name of the end of the log of the engine with this index."""
    return f"{LOGS_FOLDER}/engine-{index}.log"
