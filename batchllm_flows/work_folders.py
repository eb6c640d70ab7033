"""The work folders of jobs: where they are, and what job each belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from batchllm_operators.errors import DamagedObjectError, TerminalError
from batchllm_operators.merge.sink import all_manifests, check_sink, work_of_output
from batchllm_operators.records import Manifest
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.store import Store
from batchllm_operators.work.job_file import checked_job_file, is_work_folder, work_folders_in
from batchllm_operators.work.layout import JOB_FILE, WORK_FOLDER


@dataclass(frozen=True)
class JobFolder:
    """A work folder and what its `job.json` says."""

    work: Store
    job_id: str
    job_name: str
    source_uri: str
    sink: SinkSpec
    slice_id: str | None = None
    """Tells its output from others that were added to the sink."""

    def manifest(self) -> Manifest | None:
        """The manifest of the job's complete output; None where that is not complete, or another job's.

        The folder around the work folder is looked at first: a sink may have been moved or copied with all it holds.
        """
        outputs = [Store(self.sink.uri, self.sink.storage)]
        around, _, folder = self.work.uri.rpartition("/")[0].rpartition("/")
        if folder == WORK_FOLDER:
            outputs.insert(0, Store(around, self.work.options))
        found = (self._manifest_in(output) for output in outputs)
        return next((manifest for manifest in found if manifest is not None), None)

    def _manifest_in(self, output: Store) -> Manifest | None:
        try:
            return check_sink(output, "overwrite", self.job_id, slice_id=self.slice_id)
        except TerminalError:
            return None  # outputs of another kind have taken the place of this one


def find_work_folders(uri: str, storage: StorageOptions, *, required: bool = True) -> list[Store]:
    """The work folders that a URI stands for: of a sink, of a folder of work folders, or one itself; the newest first.

    Raises:
        TerminalError: there is none, and one is required.
    """
    root = Store(uri, storage)
    if is_work_folder(root):
        return [root]
    below = root.folder(WORK_FOLDER)
    found = [below.folder(name) for name in work_folders_in(below)]
    known = {one.uri for one in found}
    found = [one for one in _works_of_outputs(root) if one.uri not in known] + found
    found = found or [root.folder(name) for name in work_folders_in(root)]
    if required and not found:
        raise TerminalError(
            f"no job here: expected the folder of a job's output, or a work folder with its {JOB_FILE}", uri=root.uri
        )
    return found


def job_folder(work: Store) -> JobFolder:
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
        return JobFolder(
            work=work,
            job_id=file.job_id,
            job_name=str(job["name"]),
            source_uri=str(job["source"]["uri"]),
            sink=SinkSpec.model_validate(sink),
            slice_id=file.slice_id,
        )
    except (DamagedObjectError, KeyError, TypeError, AttributeError, ValidationError) as error:
        why = error.message if isinstance(error, DamagedObjectError) else type(error).__name__
        raise TerminalError(
            f"{JOB_FILE} is not as this version of batchllm-flows writes it: {why}",
            uri=work.uri_of(JOB_FILE),
        ) from error


def _works_of_outputs(sink: Store) -> list[Store]:
    """The work folders of the outputs in a folder, which `execution.work_uri` may have put anywhere.

    Those of a sink that this one is a copy of are not its own.
    """
    try:
        manifests = all_manifests(sink)
    except TerminalError:
        return []  # damaged, or not one of ours: what it belongs to is not known
    works = [work_of_output(sink, manifest) for manifest in manifests]
    return [work for work in works if _is_of(work, sink)]


def _is_of(work: Store, sink: Store) -> bool:
    if not is_work_folder(work):
        return False
    if work.path_from(sink) is not None:
        return True
    owner = job_folder(work)
    return Store(owner.sink.uri, owner.sink.storage).uri == sink.uri
