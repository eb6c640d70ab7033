"""The folder of the output: whose it is, and whether it is complete.

`_manifest.json` says that the output is complete and of which job. `_in_progress.json` is there while a merge writes,
so that the files of an interrupted merge are known as this job's when it is tried again.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import orjson
from pydantic import ValidationError

from batchllm_operators.errors import TerminalError
from batchllm_operators.keys import canonical_json
from batchllm_operators.records import MANIFEST_FILE, Manifest
from batchllm_operators.stage.readers import Source
from batchllm_operators.store import Store

IN_PROGRESS_FILE = "_in_progress.json"
_DATA_FILE = re.compile(r"part-[^/]*")


def check_sink(sink: Store, mode: Literal["error", "overwrite"], job_id: str) -> Manifest | None:
    """Look whether this job may write to the folder; changes nothing.

    Args:
        sink: the folder of the output.
        mode: of the sink part of the job.
        job_id: of this job.

    Returns:
        The manifest of this job's complete output, or None where there is something to write.

    Raises:
        TerminalError: the folder holds another job's output, or files of unknown origin, and mode is `error`.
    """
    try:
        manifest = _read_manifest(sink)
    except ValidationError as error:
        if mode == "error":
            raise TerminalError(
                f"sink: the manifest there is not one of ours; {_ADVICE}", job_id=job_id, uri=sink.uri_of(MANIFEST_FILE)
            ) from error
        return None
    files = set(data_files(sink))
    if manifest is not None and manifest.job_id == job_id:
        return manifest if files.issuperset(file.name for file in manifest.files) else None
    if mode == "overwrite":
        return None
    if manifest is not None:
        raise TerminalError(
            f"sink: holds the output of job {manifest.job_id} ({manifest.job_name!r}), this is job {job_id}; {_ADVICE}",
            uri=sink.uri,
        )
    if not files:
        return None
    owner = _job_in_progress(sink)
    if owner != job_id:
        whose = f"unfinished output of job {owner}" if owner else "part files without a manifest"
        raise TerminalError(f"sink: holds {whose}, this is job {job_id}; {_ADVICE}", uri=sink.uri)
    return None


_ADVICE = "choose another sink.uri, or set sink.mode to overwrite"


def claim_sink(sink: Store, job_id: str) -> None:
    """Make the folder ready for this job's files: what is there no longer looks complete, then goes."""
    sink.delete([MANIFEST_FILE])
    sink.write_bytes(IN_PROGRESS_FILE, canonical_json({"job_id": job_id}))
    sink.delete(data_files(sink))


def complete_sink(sink: Store, manifest: Manifest) -> None:
    """Say that the output is complete."""
    sink.write_bytes(MANIFEST_FILE, manifest.model_dump_json(indent=2).encode())
    sink.delete([IN_PROGRESS_FILE])


def data_files(sink: Store) -> list[str]:
    """Names of the output files that lie in the folder."""
    return [one.path for one in sink.objects("*") if _DATA_FILE.fullmatch(one.path)]


def refuse_input_in_sink(source: Source, sink: Store) -> None:
    """Refuse a sink that is the folder of the input: files there could be taken for output and replaced.

    Raises:
        TerminalError: names an input object in the folder of the sink.
    """
    for uri in source.object_uris():
        if uri.rpartition("/")[0] == sink.uri:
            raise TerminalError("sink.uri: the folder holds input of this job; choose another", uri=uri)


def _read_manifest(sink: Store) -> Manifest | None:
    if not sink.exists(MANIFEST_FILE):
        return None
    return Manifest.model_validate_json(sink.read_bytes(MANIFEST_FILE))


def _job_in_progress(sink: Store) -> str | None:
    if not sink.exists(IN_PROGRESS_FILE):
        return None
    try:
        claim: Any = orjson.loads(sink.read_bytes(IN_PROGRESS_FILE))
        return str(claim["job_id"])
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise TerminalError(
            f"sink: the {IN_PROGRESS_FILE} there is not one of ours; {_ADVICE}", uri=sink.uri_of(IN_PROGRESS_FILE)
        ) from error
