"""Earlier runs of a job: what they show of its output lengths."""

from __future__ import annotations

from itertools import islice

from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.store import Store
from batchllm_operators.work.job_file import read_job_file, work_folders_in

MOST_RUNS = 3


def earlier_runs(work_uri: str, storage: StorageOptions) -> list[Store]:
    """Work folders of other runs of the job of the same name and task, beside this one.

    The newest `MOST_RUNS` of them, newest first.

    A folder counts that is named by the id of its job: others may stand beside anything.
    """
    root_uri, _, folder = work_uri.rstrip("/").rpartition("/")
    if not root_uri:
        return []
    root = Store(root_uri, storage)
    own = _name_and_task(root, folder)
    if own is None:
        return []
    # Looked into one after the other: there may be hundreds, each a request to the store.
    others = (other for other in work_folders_in(root) if other != folder)
    same = (root.folder(other) for other in others if _name_and_task(root, other) == own)
    return list(islice(same, MOST_RUNS))


def _name_and_task(root: Store, folder: str) -> tuple[str, str] | None:
    file = read_job_file(root.folder(folder), only_looks=True)
    if file is None or file.job_id != folder or file.job_name is None:
        return None
    return file.job_name, file.task
