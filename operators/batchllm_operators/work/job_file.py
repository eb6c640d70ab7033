"""`job.json`: whose a work folder is; it makes a folder a work folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from batchllm_operators.keys import canonical_json
from batchllm_operators.records import InputObject
from batchllm_operators.store import Store
from batchllm_operators.task_names import GENERATE
from batchllm_operators.work.json_objects import checked_record, read_record
from batchllm_operators.work.layout import FORMAT_VERSION, JOB_FILE


class JobFile(BaseModel):
    """What readers need of the file, which other versions may have written too."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    job_id: str
    job: dict[str, Any] = {}
    """The spec, as that version writes it."""
    answers: str | None = None
    """The scope in which its answers are kept, see `batchllm_operators.answers`; None: they are not."""
    slice_id: str | None = None
    """What tells its output from others that are added to its sink; None: it is the only one there."""

    @property
    def job_name(self) -> str | None:
        """The name of the job; None where the spec tells none."""
        name = self.job.get("name")
        return None if name is None else str(name)

    @property
    def task(self) -> str:
        """The task of the job; versions before there were others wrote none."""
        return str(self.job.get("task", GENERATE))


def write_job_file(
    work: Store,
    job_id: str,
    job: Mapping[str, Any],
    objects: Sequence[InputObject],
    answers: str | None,
    slice_id: str | None = None,
) -> None:
    """Say whose the work folder is.

    Args:
        work: the work folder.
        job_id: of the job.
        job: its spec, as JSON values.
        objects: of its input.
        answers: the scope in which its answers are kept; None: they are not.
        slice_id: tells its output from others of the sink, where it is added to them.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "job_id": job_id,
        "job": job,
        "input": [one.model_dump() for one in objects],
        "answers": answers,
        "slice_id": slice_id,
    }
    work.write_bytes(JOB_FILE, canonical_json(content))


def read_job_file(work: Store, *, only_looks: bool = False) -> JobFile | None:
    """Whose a work folder is; None where that is not told.

    Args:
        work: the work folder.
        only_looks: a damaged file stays where it is; else it is set aside.
    """
    return read_record(JobFile, work, JOB_FILE, only_looks=only_looks)


def checked_job_file(work: Store) -> JobFile | None:
    """Whose a work folder is; None where there is no `job.json`.

    Raises:
        DamagedObjectError: it is not the file of a job.
    """
    return checked_record(JobFile, work, JOB_FILE)


def is_work_folder(folder: Store) -> bool:
    """Whether a folder is the work folder of a job."""
    return folder.exists(JOB_FILE)


def work_folders_in(folder: Store) -> Iterator[str]:
    """Names of the work folders in a folder, the one whose job began last first."""
    return (name.partition("/")[0] for name in folder.newest(f"*/{JOB_FILE}"))
