"""The work folders of jobs: where they are, and what job each belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from batchllm_operators.errors import DamagedObjectError, TerminalError
from batchllm_operators.merge.sink import check_sink, read_manifest, work_of_output
from batchllm_operators.records import Manifest
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.store import Store
from batchllm_operators.work.job_file import checked_job_file, is_work_folder, work_folders_in
from batchllm_operators.work.layout import JOB_FILE, WORK_FOLDER


@dataclass(frozen=True)
class OwnedFolder:
    """A work folder and what its `job.json` says."""

    work: Store
    job_id: str
    job_name: str
    source_uri: str
    sink: SinkSpec

    def manifest(self) -> Manifest | None:
        """The manifest of the job's complete output; None where that is not complete, or another job's.

        The folder around the work folder is looked at first: a sink may have been moved or copied with all it holds.
        """
        outputs = [Store(self.sink.uri, self.sink.storage)]
        around, _, folder = self.work.uri.rpartition("/")[0].rpartition("/")
        if folder == WORK_FOLDER:
            outputs.insert(0, Store(around, self.work.options))
        found = (check_sink(output, "overwrite", self.job_id) for output in outputs)
        return next((manifest for manifest in found if manifest is not None), None)


def find_work_folders(uri: str, storage: StorageOptions) -> list[Store]:
    """The work folders that a URI stands for: of a sink, of a folder of work folders, or one itself; the newest first.

    Raises:
        TerminalError: there is none.
    """
    root = Store(uri, storage)
    if is_work_folder(root):
        return [root]
    below = root.folder(WORK_FOLDER)
    found = [below.folder(name) for name in work_folders_in(below)]
    elsewhere = _work_of_output(root)
    if elsewhere is not None and elsewhere.uri not in {one.uri for one in found} and is_work_folder(elsewhere):
        found.insert(0, elsewhere)
    found = found or [root.folder(name) for name in work_folders_in(root)]
    if not found:
        raise TerminalError(
            f"no job here: expected the folder of a job's output, or a work folder with its {JOB_FILE}", uri=root.uri
        )
    return found


def owned_folder(work: Store) -> OwnedFolder:
    """Whose a work folder is.

    Raises:
        TerminalError: `job.json` is not as this version writes it.
    """
    try:
        file = checked_job_file(work)
        if file is None:
            raise TerminalError(f"no {JOB_FILE} here", uri=work.uri)
        job = file.job
        sink = {name: value for name, value in job["sink"].items() if name in SinkSpec.model_fields}
        return OwnedFolder(
            work=work,
            job_id=file.job_id,
            job_name=str(job["name"]),
            source_uri=str(job["source"]["uri"]),
            sink=SinkSpec.model_validate(sink),
        )
    except (DamagedObjectError, KeyError, TypeError, AttributeError, ValidationError) as error:
        why = error.message if isinstance(error, DamagedObjectError) else type(error).__name__
        raise TerminalError(
            f"{JOB_FILE} is not as this version of batchllm-flows writes it: {why}",
            uri=work.uri_of(JOB_FILE),
        ) from error


def _work_of_output(sink: Store) -> Store | None:
    """The work folder of the output in a folder, which `execution.work_uri` may have put anywhere.

    That of a sink that this one is a copy of is not its own.
    """
    try:
        manifest = read_manifest(sink)
    except TerminalError:
        return None  # damaged, or not one of ours: what it belongs to is not known
    if manifest is None:
        return None
    work = work_of_output(sink, manifest)
    if work.path_from(sink) is not None or not is_work_folder(work):
        return work
    owner = owned_folder(work)
    return work if Store(owner.sink.uri, owner.sink.storage).uri == sink.uri else None
