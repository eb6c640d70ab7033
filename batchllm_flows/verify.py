"""Whether a job's output and work folder are what was written: everything is read, and compared with what it should be.

A run looks at names and sizes of its output, and at what it takes up again. This looks at every byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from batchllm_flows.report import JobReport
from batchllm_operators.answers import check_answers_object
from batchllm_operators.batch_sizes import NUMBERS_AT_A_TIME
from batchllm_operators.errors import DamagedObjectError, TerminalError
from batchllm_operators.formats import format_named
from batchllm_operators.merge.claim import data_files
from batchllm_operators.merge.sink import all_manifests, changed_files, work_of_output
from batchllm_operators.records import Manifest, OutputFile, PlanSummary, Record, StageSummary
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.store import Store
from batchllm_operators.task_names import GENERATE
from batchllm_operators.tasks import Task, task_named
from batchllm_operators.wording import counted
from batchllm_operators.work.bundles import is_bundle
from batchllm_operators.work.damage import quarantined
from batchllm_operators.work.job_file import JobFile, checked_job_file
from batchllm_operators.work.json_objects import checked_record
from batchllm_operators.work.layout import (
    ANSWERS_FOLDER,
    ATTENTION_TRACE_FOLDER,
    JOB_FILE,
    MANIFEST_FILE,
    MANIFESTS_FOLDER,
    PLAN_SUMMARY,
    QUARANTINE_FOLDER,
    REPORT_FILE,
    RESULTS_FOLDER,
    STAGED_FOLDER,
    STAGED_SUMMARY,
    TRACE_FOLDER,
    manifest_name,
)
from batchllm_operators.work.results import checked_result_part

READERS = 8
"""Objects read at a time: reading mostly waits for the disk or the network."""

Kind = TypeVar("Kind", bound=Record)


class Fault(Record):
    """One object that is not what it should be."""

    uri: str
    what: str


class Verification(Record):
    """What reading a job's output and work folder has shown."""

    output_uri: str
    work_uris: tuple[str, ...]
    """The work folder of each output that the folder holds."""
    objects: int
    """The objects that were read and compared."""
    rows: int
    """The rows of all outputs."""
    faults: tuple[Fault, ...]
    set_aside: tuple[str, ...]
    """Damaged objects that earlier runs had found, moved to `quarantine/` and made again; no faults now."""


def verify_output(sink: SinkSpec) -> Verification:
    """Recompute the digests and row counts of all that the manifest lists, and check the work folder.

    A work folder that was removed is no fault: the output does not need it.

    Args:
        sink: the folder of the output, and how to reach it.

    Raises:
        TerminalError: there is no complete output, or its manifest is damaged or of another version.
        TransientError: the store does not answer.
    """
    output = Store(sink.uri, sink.storage)
    manifests = all_manifests(output)
    if not manifests:
        raise TerminalError(f"no complete output here: expected {MANIFEST_FILE} or {MANIFESTS_FOLDER}/", uri=output.uri)
    works = [work_of_output(output, manifest) for manifest in manifests]
    checks: list[Check] = [partial(_outputs_as_a_whole, output, manifests)]
    checks += _checks_of_answers(output)
    for manifest, work in zip(manifests, works, strict=True):
        checks += [*_output_checks(output, manifest), *_work_checks(work, manifest)]
    with ThreadPoolExecutor(READERS, thread_name_prefix="verify") as readers:
        found = list(readers.map(lambda check: check(), checks))
    return Verification(
        output_uri=output.uri,
        work_uris=tuple(work.uri for work in works),
        objects=len(checks),
        rows=sum(manifest.rows for manifest in manifests),
        faults=tuple(fault for faults in found for fault in faults),
        set_aside=tuple(name for work in works for name in quarantined(work)),
    )


def verification_markdown(found: Verification) -> str:
    """What `verify_output` found, to be read."""
    if not found.faults:
        lines = [f"{found.output_uri}: whole. {counted(found.objects, 'object')} read, {counted(found.rows, 'row')}."]
    else:
        lines = [f"{found.output_uri}: {len(found.faults):,} of {counted(found.objects, 'check')} failed.", ""]
        lines += [f"- `{fault.uri}`: {fault.what}" for fault in found.faults]
        lines += [
            "",
            "Delete what is damaged and run the job again: it writes the output anew from the kept answers, and",
        ]
        lines += ["computes again only those that are lost."]
    if found.set_aside:
        lines += ["", f"Damaged objects that earlier runs have set aside: {', '.join(found.set_aside)}"]
    return "\n".join(lines) + "\n"


Check = Callable[[], list[Fault]]


def _output_checks(output: Store, manifest: Manifest) -> Iterator[Check]:
    changed = changed_files(output, manifest)
    for file in manifest.files:
        yield partial(_output_file, output, file, changed.get(file.name), manifest.layout.format)
    if manifest.inputs is not None:
        yield partial(_readable, output, manifest.inputs, lambda name: _scan(output, name))


def _output_file(output: Store, file: OutputFile, known: str | None, form: str) -> list[Fault]:
    if known is not None:
        return [_fault(output, file.name, known)]
    digest = output.digest(file.name)
    if digest != file.digest:
        return [_fault(output, file.name, f"expected digest {file.digest}, found {digest}")]
    rows = format_named(form).required_writer().count_rows(output, file.name)
    if rows == file.rows:
        return []
    return [_fault(output, file.name, f"expected {counted(file.rows, 'row')}, found {rows:,}")]


def _outputs_as_a_whole(output: Store, manifests: Sequence[Manifest]) -> list[Fault]:
    """Files that no manifest lists, and manifests whose files have other rows in sum."""
    listed = {file.name for manifest in manifests for file in manifest.files}
    with_folders = any(manifest.slice_id is not None for manifest in manifests)
    faults = [
        _fault(output, name, "no manifest lists it: another run writes it now, or was stopped")
        for name in data_files(output, with_folders=with_folders)
        if name not in listed
    ]
    for manifest in manifests:
        rows = sum(file.rows for file in manifest.files)
        if rows != manifest.rows:
            what = f"expected {counted(manifest.rows, 'row')} in all files, it lists {rows:,}"
            faults.append(_fault(output, manifest_name(manifest.slice_id), what))
    return faults


def _checks_of_answers(output: Store) -> Iterator[Check]:
    """Of the answers that are kept beside the output for later runs."""
    for name in output.names(ANSWERS_FOLDER):
        if f"/{QUARANTINE_FOLDER}/" in name:
            continue
        if name.endswith(".parquet"):
            yield partial(_readable, output, name, lambda name: _scan(output, name))
        else:
            yield partial(_readable, output, name, lambda name: check_answers_object(output, name))


def _work_checks(work: Store, manifest: Manifest) -> Iterator[Check]:
    names = set(work.names())
    if not names:
        return
    job_file, faults_of_job = _job_file(work, manifest)
    yield lambda: faults_of_job
    if any(name.startswith(f"{STAGED_FOLDER}/") for name in names):
        staged, faults = _record(work, STAGED_SUMMARY, StageSummary)
        yield lambda: faults
        yield from _digest_checks(work, [] if staged is None else [(part.name, part.digest) for part in staged.parts])
    if PLAN_SUMMARY in names:
        plan, plan_faults = _record(work, PLAN_SUMMARY, PlanSummary)
        yield lambda: plan_faults
        yield from _digest_checks(work, [] if plan is None else [(one.name, one.digest) for one in plan.bundles])
    elif any(map(is_bundle, names)):
        yield lambda: [_fault(work, PLAN_SUMMARY, "it is missing")]
    if REPORT_FILE in names:
        yield lambda: _record(work, REPORT_FILE, JobReport)[1]
    task, faults_of_task = _task(work, GENERATE if job_file is None else job_file.task)
    if faults_of_task:
        yield lambda: faults_of_task
    for name in sorted(names):
        folder = name.partition("/")[0]
        if folder == RESULTS_FOLDER and task is not None:
            yield partial(_readable, work, name, partial(_check_result_part, work, task))
        elif folder in (TRACE_FOLDER, ATTENTION_TRACE_FOLDER):
            yield partial(_readable, work, name, lambda name: _scan(work, name))


def _job_file(work: Store, manifest: Manifest) -> tuple[JobFile | None, list[Fault]]:
    try:
        file = checked_job_file(work)
    except DamagedObjectError:
        return None, [_fault(work, JOB_FILE, "it is not the file of a job")]
    if file is None:
        return None, [_fault(work, JOB_FILE, "it is missing")]
    if file.job_id == manifest.job_id:
        return file, []
    return file, [_fault(work, JOB_FILE, f"expected job {manifest.job_id}, found {file.job_id}")]


def _task(work: Store, name: str) -> tuple[Task | None, list[Fault]]:
    """The task of the job, without which nobody can say what a result part must hold."""
    try:
        return task_named(name), []
    except TerminalError as error:
        return None, [_fault(work, RESULTS_FOLDER, f"its parts were not read: {error.message}")]


def _check_result_part(work: Store, task: Task, name: str) -> None:
    checked_result_part(work, name, task)


def _record(work: Store, name: str, kind: type[Kind]) -> tuple[Kind | None, list[Fault]]:
    try:
        found = checked_record(kind, work, name)
    except DamagedObjectError as error:
        return None, [_fault(work, name, error.message)]
    return found, [] if found is not None else [_fault(work, name, "it is missing")]


def _digest_checks(work: Store, objects: Iterable[tuple[str, str]]) -> Iterator[Check]:
    for name, digest in objects:
        yield partial(_digest, work, name, digest)


def _digest(work: Store, name: str, expected: str) -> list[Fault]:
    if not work.exists(name):
        return [_fault(work, name, "it is missing")]
    found = work.digest(name)
    return [] if found == expected else [_fault(work, name, f"expected digest {expected}, found {found}")]


def _readable(work: Store, name: str, read: Callable[[str], object]) -> list[Fault]:
    try:
        read(name)
    except DamagedObjectError as error:
        return [_fault(work, name, error.message)]
    return []


def _scan(work: Store, name: str) -> None:
    schema, _ = work.parquet_schema(name)
    for _ in work.scan_parquet(name, schema.names, NUMBERS_AT_A_TIME):
        pass


def _fault(store: Store, name: str, what: str) -> Fault:
    return Fault(uri=store.uri_of(name), what=what)
