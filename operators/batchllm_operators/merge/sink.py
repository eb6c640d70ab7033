"""The folder of the output: whose it is, whether it is complete, and where it must not be.

`_manifest.json` says that the output is complete, of which job it is, and which files it is made of.
"""

from __future__ import annotations

from typing import Any, Literal

import orjson
from pydantic import ValidationError

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import Source, formats_in_use
from batchllm_operators.formats.input_objects import is_hidden, takes_objects_of
from batchllm_operators.merge.claim import (
    ADVICE,
    IN_PROGRESS_FILE,
    claimed_by,
    data_files,
    job_of_file,
    refuse_claim_of_another,
)
from batchllm_operators.records import Manifest, OutputLayout
from batchllm_operators.store import Store
from batchllm_operators.wording import counted
from batchllm_operators.work.job_file import is_work_folder
from batchllm_operators.work.layout import FORMAT_VERSION, MANIFEST_FILE, WORK_FOLDER


def check_sink(
    sink: Store, mode: Literal["error", "overwrite"], job_id: str, layout: OutputLayout | None = None
) -> Manifest | None:
    """Look whether this job may write to the folder; changes nothing.

    Args:
        sink: the folder of the output.
        mode: of the sink part of the job.
        job_id: of this job.
        layout: how the job wants its output written; None: as it is.

    Returns:
        The manifest of this job's complete output, or None where there is something to write: also where one of its
        files is gone or has another size than was written, or where the output is in another layout.

    Raises:
        TerminalError: the folder holds another job's output, or files of unknown origin, and mode is `error`.
    """
    try:
        manifest = read_manifest(sink)
    except TerminalError:
        if mode == "overwrite":
            return None
        raise
    if manifest is not None and manifest.job_id == job_id:
        as_wanted = layout is None or layout == manifest.layout
        return manifest if as_wanted and not changed_files(sink, manifest) else None
    if mode == "overwrite":
        return None
    if manifest is not None:
        raise TerminalError(
            f"sink: holds the output of job {manifest.job_id} ({manifest.job_name!r}), this is job {job_id}; {ADVICE}",
            uri=sink.uri,
        )
    files = data_files(sink)
    if files and claimed_by(sink) is None and sink.exists(IN_PROGRESS_FILE):
        raise TerminalError(
            f"sink: the {IN_PROGRESS_FILE} there is not one of ours; {ADVICE}", uri=sink.uri_of(IN_PROGRESS_FILE)
        )
    foreign = {job_of_file(name) for name in files} - {job_id}
    if foreign:
        owner = min(filter(None, foreign), default=None)
        whose = f"unfinished output of job {owner}" if owner else "part files without a manifest"
        raise TerminalError(f"sink: holds {whose}, this is job {job_id}; {ADVICE}", uri=sink.uri)
    refuse_claim_of_another(sink, job_id)
    return None


def read_manifest(sink: Store) -> Manifest | None:
    """The manifest of the folder; None where there is none.

    Raises:
        TerminalError: it is damaged, or somebody else's, or was written by another version of this package.
    """
    content = sink.content(MANIFEST_FILE)
    if content is None:
        return None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise TerminalError(
            f"sink: the manifest there is {_kind_of_manifest(content)}; {ADVICE}", uri=sink.uri_of(MANIFEST_FILE)
        ) from error


def work_of_output(sink: Store, manifest: Manifest) -> Store:
    """The work folder of an output: the one inside the sink, to wherever that was moved or copied, else as written."""
    inside = sink.folder(f"{WORK_FOLDER}/{manifest.job_id}")
    return inside if is_work_folder(inside) else Store(manifest.work_uri, sink.options)


def changed_files(sink: Store, manifest: Manifest) -> dict[str, str]:
    """The output files that are gone or have another size than the manifest says, and what is wrong with each."""
    sizes = {one.path: one.size for one in sink.objects("*")}
    faults = {}
    for file in manifest.files:
        if file.name not in sizes:
            faults[file.name] = "it is missing"
        elif sizes[file.name] != file.bytes:
            faults[file.name] = f"expected {counted(file.bytes, 'byte')}, found {sizes[file.name]:,}"
    return faults


def refuse_overlap(source: Source, sink: Store, work: Store, answers: Store | None = None) -> None:
    """Refuse places where output could be taken for input, or input for output.

    Args:
        source: the input.
        sink: the folder of the output.
        work: the work folder.
        answers: the folder of kept answers, where the job names one.

    Raises:
        TerminalError: one of the folders is where the source's URI looks for input, or input lies at or below the sink.
            Names that begin with `_` or `.` do not count: they are never input, nor output.
    """
    spec = source.spec
    endings = {form.suffixes[0] for form in formats_in_use()}  # of the work folder, and of a sink of any format
    for uri in source.object_uris():
        inside = Store(uri, spec.storage).path_from(sink)
        if inside is not None and not is_hidden(inside):
            where = "the folder holds" if "/" not in inside else "a folder below it holds"
            raise TerminalError(f"sink.uri: {where} input of this job; choose another", uri=uri)
    for field, folder in (("sink.uri", sink), ("execution.work_uri", work), ("execution.reuse", answers)):
        if folder is not None and takes_objects_of(spec.uri, spec.storage, folder, endings):
            raise TerminalError(
                f"{field}: what is written there would be input of the next run, by source.uri {spec.uri!r};"
                " choose a folder elsewhere",
                uri=folder.uri,
            )


def _kind_of_manifest(content: bytes) -> str:
    try:
        values: Any = orjson.loads(content)
        version, job_id = values["format_version"], values["job_id"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return "not one of ours"
    if version == FORMAT_VERSION:
        return "not one of ours"
    return f"of job {job_id}, written by another version (its format is {version}, this one's {FORMAT_VERSION})"
