"""The objects of a source: those that its URI names and that are of its format."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from batchllm_operators.errors import TerminalError
from batchllm_operators.records import InputObject
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.stage.input_objects import FoundInput, Verdicts, find_input
from batchllm_operators.stage.object_content import (
    JSON_LINES_SUFFIXES,
    MAYBE_JSON_LINES_SUFFIXES,
    refuse_other_than_json_lines,
)
from batchllm_operators.store import Store

_PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
_CONTENT_READERS = 16


def source_objects(spec: SourceSpec, known: Verdicts | None = None) -> FoundInput:
    """Find the objects of a source.

    Args:
        spec: of the source.
        known: verdicts on objects that were looked into before and are not again.

    Raises:
        TerminalError: no object matches, no access, or those that match hold documents, not JSON Lines.
    """
    if spec.format == "parquet":
        return find_input(spec.uri, spec.storage, _PARQUET_SUFFIXES)
    found = find_input(spec.uri, spec.storage, JSON_LINES_SUFFIXES + MAYBE_JSON_LINES_SUFFIXES)
    return _without_documents(found, known or {}) if found.is_listed else found


def _without_documents(found: FoundInput, known: Verdicts) -> FoundInput:
    """A listed folder without objects named `.json` that hold a document (settings, say), not JSON Lines.

    Raises:
        TerminalError: nothing is left.
    """
    doubtful = [one for one in found.objects if one.path.lower().endswith(MAYBE_JSON_LINES_SUFFIXES)]
    with ThreadPoolExecutor(_CONTENT_READERS) as readers:
        unseen = [one for one in doubtful if one not in known]
        seen = dict(zip(unseen, readers.map(lambda one: _refusal(found.store, one), unseen), strict=True))
    verdicts = {one: seen[one] if one in seen else known[one] for one in doubtful}
    refused = {one.path: error for one, error in verdicts.items() if error is not None}
    objects = tuple(one for one in found.objects if one.path not in refused)
    if not objects:
        raise next(iter(refused.values()))
    reasons = tuple(error.message.removeprefix("source: object ") for error in refused.values())
    return replace(found, objects=objects, left_out=found.left_out + reasons, verdicts=verdicts)


def _refusal(store: Store, one: InputObject) -> TerminalError | None:
    """Why an object is no JSON Lines."""
    with store.reader(one.path) as file:
        try:
            refuse_other_than_json_lines(file, one.path)
        except TerminalError as error:
            return error
    return None
