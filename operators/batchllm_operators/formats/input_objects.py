"""The objects that a source URI names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

from fsspec.utils import glob_translate

from batchllm_operators.errors import NoInputError
from batchllm_operators.records import InputObject
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.store import Store
from batchllm_operators.wording import first_of

_GLOB_MARKS = frozenset("*?[")
_NO_DATA_SUFFIXES = (".crc", ".md5", ".sha256")


@dataclass(frozen=True)
class FoundInput:
    """What a source URI names.

    Attributes:
        store: the folder that the paths are relative to.
        objects: sorted by path, with what tells one version of an object from another.
        left_out: objects below the folder that may be data and are not taken, each with the reason.
        again: looks for them anew.
        is_listed: whether a folder was listed; an object or a glob is what the user spelled out.
        unfiltered: the objects before some were left out by their partition; empty: none were. They decide types.
    """

    store: Store
    objects: tuple[InputObject, ...]
    again: Callable[[], FoundInput]
    left_out: tuple[str, ...] = ()
    is_listed: bool = False
    unfiltered: tuple[InputObject, ...] = ()

    def only(self, paths: Collection[str]) -> FoundInput:
        """Those of the objects that have these paths, now and when they are looked for anew."""
        objects = tuple(one for one in self.objects if one.path in paths)
        return replace(self, objects=objects, again=lambda: self.again().only(paths))


def find_input(uri: str, options: StorageOptions, suffixes: tuple[str, ...]) -> FoundInput:
    """The objects that a source URI names.

    Names that begin with `_` or `.`, and everything in folders of such names, never count as data, unless the URI
    itself spells them out; nor do checksums.

    Args:
        uri: an object, a folder (taken with everything below it), or a glob. `*`, `?` and `[` are letters where an
            object or a folder has them in its name.
        options: how to reach the store.
        suffixes: endings of data objects, in lower case; others below a folder are left out and named.

    Raises:
        NoInputError: nothing matches.
        TerminalError: no such bucket, access denied.
    """
    again = partial(find_input, uri, options, suffixes)
    folder, _, name = Store(uri, options).uri.rpartition("/")
    if folder and not folder.endswith("/"):  # else the URI is a bucket or the root of the disk
        parent = Store(folder, options)
        single = parent.object(name)
        if single is not None:
            return FoundInput(parent, (single,), again)
    folder, pattern = _split_at_glob(uri, options)
    store = Store(folder, options)
    objects = store.objects(pattern)
    if not is_hidden(pattern):
        objects = [one for one in objects if not is_hidden(one.path)]
    others: list[InputObject] = []
    if not pattern:
        others = [one for one in objects if not one.path.lower().endswith((*suffixes, *_NO_DATA_SUFFIXES))]
        objects = [one for one in objects if one.path.lower().endswith(suffixes)]
    if not objects:
        raise NoInputError(f"source.uri: no object matches{_expected(pattern, suffixes, others)}", uri=uri)
    left_out = tuple(f"{one.path} (unknown ending)" for one in others)
    return FoundInput(store, tuple(objects), again, left_out, is_listed=not pattern)


def takes_objects_of(uri: str, options: StorageOptions, folder: Store, suffixes: Collection[str]) -> bool:
    """Whether objects that were written to a folder would count as input of a source URI.

    Args:
        uri: of the source.
        options: how to reach it.
        folder: where objects would be written.
        suffixes: endings of their names.
    """
    base, pattern = _split_at_glob(uri, options)
    inside = folder.path_from(Store(base, options))
    if inside is None:
        return False
    names = [f"{inside}/part-00000{suffix}".lstrip("/") for suffix in suffixes]
    if not is_hidden(pattern):
        names = [name for name in names if not is_hidden(name)]
    return any(not pattern or re.fullmatch(glob_translate(pattern), name) for name in names)


def is_hidden(name: str) -> bool:
    """Whether a name, or a folder in it, begins with `_` or `.`."""
    return any(piece.startswith(("_", ".")) for piece in name.split("/"))


def _expected(pattern: str, suffixes: tuple[str, ...], others: list[InputObject]) -> str:
    if pattern:
        return ""
    there = f"; there is {first_of([one.path for one in others])}" if others else ""
    return f" (expected names that end in {', '.join(suffixes)}){there}"


def _split_at_glob(uri: str, options: StorageOptions) -> tuple[str, str]:
    """The folder before the first glob, and the pattern below it."""
    pieces = uri.rstrip("/").split("/")
    for place, piece in enumerate(pieces):
        folder = "/".join(pieces[: place + 1])
        # A folder that has this very name is no pattern; a listing of one that is not there costs one request.
        if not _GLOB_MARKS.isdisjoint(piece) and not Store(folder, options).objects():
            before = "/".join(pieces[:place]) or ("/" if place else ".")
            return before, "/".join(pieces[place:])
    return uri, ""
