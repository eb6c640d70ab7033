"""Which model a name means at the moment: the versions of its files, or the commit on the hub.

An id or a path alone says too little: a folder can be written again, a branch can move, and the answers would be of
another model under the id of the same job.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchllm_operators.digests import digest_of_bytes
from batchllm_operators.errors import TerminalError
from batchllm_operators.specs.execution import ModelSpec

_LOGGER = logging.getLogger(__name__)

SMALL_FILE_BYTES = 1 << 20
"""Up to this size the content of a file counts, and not its time."""

_WITHOUT_INFLUENCE = (".md", ".png", ".jpg", ".svg", ".lock", ".log")
_IN_EVERY_MODEL = "config.json"
_ON_HUB = ("model", "hf_config_path")
"""What is looked up on the hub where it is no path: a `generation_config` may be a word of vLLM's, `auto`."""


def model_versions(model: ModelSpec) -> dict[str, Any]:
    """What tells one version of a model from another, as JSON values: it counts in the id of the job.

    Of a local folder: the digest of each small file (configuration, chat template, generation settings, vocabulary),
    and size and modification time of each large one (weights), by name. Reading the weights would take minutes, so a
    copy of a folder is another model unless the copy keeps the times (`cp -p`, `rsync -a`). Of a hub id: the commit
    that its branch has now, or had when it was last fetched where the hub does not answer. A configuration or draft
    model named in `engine_args` counts likewise.

    Raises:
        TerminalError: a file cannot be read, or a model is not in the cache and the hub does not answer.
    """
    arguments = model.engine_args
    draft = arguments.get("speculative_config")
    named = {
        "model": (model.id, model.revision),
        "hf_config_path": (arguments.get("hf_config_path"), None),
        "generation_config": (arguments.get("generation_config"), None),
        "draft": (draft.get("model"), draft.get("revision")) if isinstance(draft, dict) else (None, None),
    }
    found = {
        use: _version(name, revision if isinstance(revision, str) else None, on_hub=use in _ON_HUB)
        for use, (name, revision) in named.items()
        if isinstance(name, str) and name
    }
    return {use: version for use, version in found.items() if version is not None}


def looks_like_path(identity: str) -> bool:
    """Whether the id of a model can only be meant as a path: ids of the Hugging Face hub are `name` or `owner/name`."""
    return identity.startswith(("/", ".", "~")) or identity.count("/") > 1


def pinned(model: ModelSpec) -> ModelSpec:
    """The model with the commit of a hub id as its revision: all that is loaded of it later is of this very commit.

    A path stays as it is, and so does what neither the hub nor the cache has.
    """
    if Path(model.id).expanduser().exists():
        return model
    commit = _commit(model.id, model.revision)
    return model if commit is None else model.model_copy(update={"revision": commit})


def _version(name: str, revision: str | None, *, on_hub: bool) -> Any:
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return {str(file.relative_to(path)): _file_version(file) for file in _files(path)}
        if path.is_file():
            return _file_version(path)
    except OSError as error:
        raise TerminalError(f"model.id: cannot read {error.filename}: {error.strerror}", uri=name) from error
    return _commit(name, revision) if on_hub else None


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
    """The commit of a hub id; None where there is none, and then staging says why the model cannot be loaded."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # The hub is asked where a branch stands now, as the tokenizer and the engine would; where it does not answer,
        # the cache says where it stood.
        cached = try_to_load_from_cache(name, _IN_EVERY_MODEL, revision=revision)
        if not isinstance(cached, str) and not constants.is_offline_mode():
            _LOGGER.info("fetching the configuration of %s", name)
        cached = hf_hub_download(name, _IN_EVERY_MODEL, revision=revision)
    except LocalEntryNotFoundError as error:
        if constants.is_offline_mode():
            return None
        raise TerminalError(
            f"model.id: {name!r} is not in the local cache, and the Hugging Face hub does not answer; check the"
            " network, or name a local folder"
        ) from error
    except (HFValidationError, HfHubHTTPError):
        return None
    return Path(cached).parent.name
