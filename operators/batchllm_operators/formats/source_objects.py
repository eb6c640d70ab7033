"""The objects of a source: those that its URI names and that are of its format."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats.base import FileFormat
from batchllm_operators.formats.input_objects import FoundInput, find_input
from batchllm_operators.records import InputObject
from batchllm_operators.specs.source import SourceSpec

_CONTENT_READERS = 16

Verdicts: TypeAlias = dict[InputObject, TerminalError | None]
"""Version of an object -> why it is not of the source's format; None where it is."""


def source_objects(spec: SourceSpec, form: FileFormat, known: Verdicts | None = None) -> FoundInput:
    """Find the objects of a source.

    Args:
        spec: of the source.
        form: its format.
        known: verdicts on objects that were looked into before and are not again.

    Raises:
        TerminalError: no object matches, no access, or those that match are not of the format.
    """
    found = find_input(spec.uri, spec.storage, form.suffixes + form.doubtful_suffixes)
    if not found.is_listed or not form.doubtful_suffixes:
        return found
    verdicts = _verdicts(found, form, known or {})
    return replace(_without_refused(found, verdicts), again=partial(source_objects, spec, form, verdicts))


def _verdicts(found: FoundInput, form: FileFormat, known: Verdicts) -> Verdicts:
    """Verdicts on the objects whose names leave open what they hold, such as settings in a `.json` object."""
    doubtful = [one for one in found.objects if one.path.lower().endswith(form.doubtful_suffixes)]
    unseen = [one for one in doubtful if one not in known]
    look = partial(form.required_reader().refusal, found.store)
    with ThreadPoolExecutor(_CONTENT_READERS) as readers:
        seen = dict(zip(unseen, readers.map(look, unseen), strict=True))
    return {one: seen[one] if one in seen else known[one] for one in doubtful}


def _without_refused(found: FoundInput, verdicts: Verdicts) -> FoundInput:
    """The listed folder without the objects that are not of the format.

    Raises:
        TerminalError: nothing is left.
    """
    refused = {one.path: error for one, error in verdicts.items() if error is not None}
    objects = tuple(one for one in found.objects if one.path not in refused)
    if not objects:
        raise next(iter(refused.values()))
    reasons = tuple(error.message.removeprefix("source: object ") for error in refused.values())
    return replace(found, objects=objects, left_out=found.left_out + reasons)
