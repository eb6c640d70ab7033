"""Which model a name means at the moment: the versions of its files, or the commit on the hub.

An id or a path alone says too little: a folder can be written again, a branch can move, and the answers would be of
another model under the id of the same job.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchllm_operators.digests import digest_of_bytes
from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.spec import ModelSpec

SMALL_FILE_BYTES = 1 << 20
"""Up to this size the content of a file counts, and not its time."""

_WITHOUT_INFLUENCE = (".md", ".png", ".jpg", ".svg", ".lock", ".log")
_SMALLEST_OF_ALL_MODELS = "config.json"


def model_versions(model: ModelSpec) -> dict[str, Any]:
    """What tells one version of a model from another, as JSON values: it counts in the id of the job.

    Of a local folder: the digest of each small file (configuration, chat template, generation settings, vocabulary),
    and size and modification time of each large one (weights), by name. Reading the weights would take minutes, so a
    copy of a folder is another model unless the copy keeps the times (`cp -p`, `rsync -a`). Of a hub id: the commit
    that it means now, as the hub says or, without a network, the local cache; where neither knows, nothing beyond the
    id and revision of the job. A tokenizer, configuration or draft model named in `engine_args` counts likewise.

    Raises:
        TerminalError: a file cannot be read.
    """
    arguments = model.engine_args
    draft = arguments.get("speculative_config")
    named = {
        "model": (model.id, model.revision),
        "tokenizer": (arguments.get("tokenizer"), arguments.get("tokenizer_revision", model.revision)),
        "hf_config_path": (arguments.get("hf_config_path"), None),
        "generation_config": (arguments.get("generation_config"), None),
        "draft": (draft.get("model"), draft.get("revision")) if isinstance(draft, dict) else (None, None),
    }
    found = {use: _version(name, revision) for use, (name, revision) in named.items() if isinstance(name, str) and name}
    return {use: version for use, version in found.items() if version is not None}


def _version(name: str, revision: object) -> Any:
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return {str(file.relative_to(path)): _file_version(file) for file in _files(path)}
        if path.is_file():
            return _file_version(path)
    except OSError as error:
        raise TerminalError(f"model.id: cannot read {error.filename}: {error.strerror}", uri=name) from error
    return _commit(name, revision if isinstance(revision, str) else None)


def _files(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".", "__pycache__")) or entry.suffix in _WITHOUT_INFLUENCE:
            continue
        if entry.is_dir() and not entry.is_symlink():  # a link may lead back here
            yield from _files(entry)
        elif entry.is_file():
            yield entry


def _file_version(file: Path) -> list[str | int]:
    status = file.stat()
    if status.st_size <= SMALL_FILE_BYTES:
        return [status.st_size, digest_of_bytes(file.read_bytes())]
    return [status.st_size, status.st_mtime_ns]


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of a hub id; None where it cannot be known, and then the model cannot be loaded either."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Staging needs this file in any case; its path in the cache names the commit.
        cached = hf_hub_download(name, _SMALLEST_OF_ALL_MODELS, revision=revision)
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError):
        return None
    return Path(cached).parent.name
