"""The folder of the output: whose it is, whether it is complete, and where it must not be.

`_manifest.json` says that the output is complete, of which job it is, and which files it is made of. A sink that runs
add their outputs to has one manifest for each in `_manifests/`: who follows them never sees half an output.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

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
    owner_of_file,
    refuse_claim_of_another,
)
from batchllm_operators.records import Manifest, OutputLayout
from batchllm_operators.specs.sink import SinkMode
from batchllm_operators.store import Store
from batchllm_operators.wording import counted
from batchllm_operators.work.job_file import is_work_folder
from batchllm_operators.work.layout import FORMAT_VERSION, MANIFEST_FILE, MANIFESTS_FOLDER, WORK_FOLDER, manifest_name

_READERS = 16
_ADDED_MANIFEST = re.compile(rf"{MANIFESTS_FOLDER}/[0-9a-f]+\.json")


def check_sink(
    sink: Store, mode: SinkMode, job_id: str, layout: OutputLayout | None = None, slice_id: str | None = None
) -> Manifest | None:
    """Look whether this job may write to the folder; changes nothing.

    Args:
        sink: the folder of the output.
        mode: of the sink part of the job.
        job_id: of this job.
        layout: how the job wants its output written; None: as it is.
        slice_id: of an output that is added to those of other runs.

    Returns:
        The manifest of this job's complete output, or None where there is something to write: also where one of its
        files is gone or has another size than was written, or where the output is in another layout.

    Raises:
        TerminalError: the folder holds another job's output, or files of unknown origin, and mode is `error`. Or it
            holds one output where outputs are to be added, or added outputs where it is to hold one.
    """
    if slice_id is not None:
        return _check_slice(sink, job_id, layout, slice_id)
    _refuse_added_outputs(sink)
    try:
        manifest = read_manifest(sink)
    except TerminalError:
        if mode == "overwrite":
            return None
        raise
    if manifest is not None and manifest.job_id == job_id:
        return _as_wanted(sink, manifest, layout)
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
    foreign = {owner_of_file(name) for name in files} - {job_id}
    if foreign:
        owner = min(filter(None, foreign), default=None)
        whose = f"unfinished output of job {owner}" if owner else "part files without a manifest"
        raise TerminalError(f"sink: holds {whose}, this is job {job_id}; {ADVICE}", uri=sink.uri)
    refuse_claim_of_another(sink, job_id)
    return None


def _check_slice(sink: Store, job_id: str, layout: OutputLayout | None, slice_id: str) -> Manifest | None:
    if sink.exists(MANIFEST_FILE):
        raise TerminalError(
            "sink: holds one whole output, to which none can be added; choose another sink.uri, or sink.mode overwrite",
            uri=sink.uri,
        )
    manifest = read_manifest(sink, slice_id)
    if manifest is None or manifest.job_id != job_id:
        return None
    return _as_wanted(sink, manifest, layout)


def _refuse_added_outputs(sink: Store) -> None:
    if manifest_names(sink, only_added=True):
        raise TerminalError(
            "sink: holds outputs that runs have added (sink.mode append or partition), which one whole output would"
            " replace; choose another sink.uri",
            uri=sink.uri,
        )


def _as_wanted(sink: Store, manifest: Manifest, layout: OutputLayout | None) -> Manifest | None:
    """The manifest, where its output is whole and in this layout."""
    as_wanted = layout is None or layout == manifest.layout
    return manifest if as_wanted and not changed_files(sink, manifest) else None


def manifest_names(sink: Store, *, only_added: bool = False) -> list[str]:
    """Names of the manifests of a sink: of the one output, or of all that were added, sorted.

    Args:
        sink: the folder.
        only_added: leave the one output out.
    """
    one = [] if only_added or not sink.exists(MANIFEST_FILE) else [MANIFEST_FILE]
    added = [name for name in sink.names(MANIFESTS_FOLDER) if _ADDED_MANIFEST.fullmatch(name)]
    return one + added


def all_manifests(sink: Store) -> list[Manifest]:
    """The manifests of all outputs of a sink, sorted by their names.

    Raises:
        TerminalError: one is damaged, or somebody else's, or was written by another version of this package.
    """
    with ThreadPoolExecutor(_READERS) as readers:
        read = readers.map(partial(_manifest_named, sink), manifest_names(sink))
        return [manifest for manifest in read if manifest is not None]


def newest_added_manifest(sink: Store, job_name: str | None = None) -> Manifest | None:
    """The manifest of the output that was added last; None where none was.

    Args:
        sink: the folder.
        job_name: of the jobs that count; None: all.

    Raises:
        TerminalError: as `read_manifest`.
    """
    for name in sink.newest(f"{MANIFESTS_FOLDER}/*.json"):
        manifest = _manifest_named(sink, name) if _ADDED_MANIFEST.fullmatch(name) else None
        if manifest is not None and job_name in (None, manifest.job_name):
            return manifest
    return None


def read_manifest(sink: Store, slice_id: str | None = None) -> Manifest | None:
    """The manifest of an output; None where there is none.

    Args:
        sink: the folder.
        slice_id: of an output that was added to others.

    Raises:
        TerminalError: it is damaged, or somebody else's, or was written by another version of this package.
    """
    return _manifest_named(sink, manifest_name(slice_id))


def _manifest_named(sink: Store, name: str) -> Manifest | None:
    content = sink.content(name)
    if content is None:
        return None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise TerminalError(
            f"sink: the manifest there is {_kind_of_manifest(content)}; {ADVICE}", uri=sink.uri_of(name)
        ) from error


def work_of_output(sink: Store, manifest: Manifest) -> Store:
    """The work folder of an output: the one inside the sink, to wherever that was moved or copied, else as written."""
    inside = sink.folder(f"{WORK_FOLDER}/{manifest.job_id}")
    return inside if is_work_folder(inside) else Store(manifest.work_uri, sink.options)


def changed_files(sink: Store, manifest: Manifest) -> dict[str, str]:
    """The output files that are gone or have another size than the manifest says, and what is wrong with each."""
    in_folders = any("/" in file.name for file in manifest.files)
    sizes = {one.path: one.size for one in sink.objects("" if in_folders else "*")}
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
