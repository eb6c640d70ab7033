"""The objects that a source URI names."""

from __future__ import annotations

import re

from fsspec.utils import glob_translate

from batchllm_operators.errors import TerminalError
from batchllm_operators.records import InputObject
from batchllm_operators.spec import StorageOptions
from batchllm_operators.store import Store

_GLOB_MARKS = "*?["


def find_input(uri: str, options: StorageOptions, suffixes: tuple[str, ...]) -> tuple[Store, list[InputObject]]:
    """The objects that a source URI names, sorted by path, with what tells one version of an object from another.

    Names that begin with `_` or `.`, and everything in folders of such names, never count as data, unless the URI
    itself spells them out.

    Args:
        uri: an object, a folder (taken with everything below it), or a glob.
        options: how to reach the store.
        suffixes: endings of data objects; others below a folder are left out.

    Returns:
        The store that the paths are relative to, and the objects.

    Raises:
        TerminalError: nothing matches, no such bucket, access denied.
    """
    folder, _, name = Store(uri, options).uri.rpartition("/")
    if folder and not folder.endswith("/"):  # else the URI is a bucket or the root of the disk
        parent = Store(folder, options)
        single = parent.object(name)
        if single is not None:
            return parent, [single]
    folder, pattern = _split_at_glob(uri)
    store = Store(folder, options)
    objects = store.objects(pattern)
    if not is_hidden(pattern):
        objects = [one for one in objects if not is_hidden(one.path)]
    if not pattern:
        objects = [one for one in objects if one.path.endswith(suffixes)]
    if not objects:
        expected = "" if pattern else f" (expected names that end in {', '.join(suffixes)})"
        raise TerminalError(f"source.uri: no object matches{expected}", uri=uri)
    return store, objects


def takes_objects_of(uri: str, options: StorageOptions, folder: Store) -> bool:
    """Whether objects that were written to a folder would count as input of a source URI.

    Args:
        uri: of the source.
        options: how to reach it.
        folder: where objects of any of our formats would be written.
    """
    base, pattern = _split_at_glob(uri)
    inside = folder.path_from(Store(base, options))
    if inside is None:
        return False
    names = [f"{inside}/part-00000{suffix}".lstrip("/") for suffix in (".parquet", ".jsonl")]
    if not is_hidden(pattern):
        names = [name for name in names if not is_hidden(name)]
    return any(not pattern or re.fullmatch(glob_translate(pattern), name) for name in names)


def is_hidden(name: str) -> bool:
    """Whether a name, or a folder in it, begins with `_` or `.`."""
    return any(piece.startswith(("_", ".")) for piece in name.split("/"))


def _split_at_glob(uri: str) -> tuple[str, str]:
    """The folder before the first glob mark, and the pattern below it."""
    first = min((uri.index(mark) for mark in _GLOB_MARKS if mark in uri), default=None)
    if first is None:
        return uri, ""
    folder, slash, _ = uri[:first].rpartition("/")
    return (folder or "/", uri[len(folder) + 1 :]) if slash else (".", uri)
