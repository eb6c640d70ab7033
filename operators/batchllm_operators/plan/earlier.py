"""Earlier runs of a job: what they show of its output lengths."""

from __future__ import annotations

from itertools import islice
from typing import Any

import orjson

from batchllm_operators.records import JOB_FILE
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.store import Store

MOST_RUNS = 3


def earlier_runs(work_uri: str, storage: StorageOptions) -> list[Store]:
    """Work folders of other runs of the job of the same name, beside this one; the newest `MOST_RUNS`, newest first.

    A folder counts that is named by the id of its job: others may stand beside anything.
    """
    root_uri, _, folder = work_uri.rstrip("/").rpartition("/")
    if not root_uri:
        return []
    root = Store(root_uri, storage)
    own = _job_name(root, folder)
    if own is None:
        return []
    # Looked into one after the other: there may be hundreds, each a request to the store.
    others = (name.partition("/")[0] for name in root.newest(f"*/{JOB_FILE}"))
    same = (root.folder(other) for other in others if other != folder and _job_name(root, other) == own)
    return list(islice(same, MOST_RUNS))


def _job_name(root: Store, folder: str) -> str | None:
    name = f"{folder}/{JOB_FILE}"
    if not root.exists(name):
        return None
    try:
        content: Any = orjson.loads(root.read_bytes(name))
        return str(content["job"]["name"]) if content["job_id"] == folder else None
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None  # not a job of ours
