"""What an earlier run has staged, and whether it can be used again."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pydantic import ValidationError

from batchllm_operators.quarantine import set_aside
from batchllm_operators.records import STAGED_FOLDER, STAGED_SUMMARY, StagedPart, StageSummary
from batchllm_operators.store import Store

READERS = 8
"""Parts read at a time: reading mostly waits for the disk or the network."""


def finished_staging(work: Store, input_digest: str, settings_digest: str) -> StageSummary | None:
    """The summary of what is staged, if it is of this input and these settings, and whole.

    Otherwise nothing counts as staged afterwards, and what is damaged is set aside.

    Args:
        work: the work folder.
        input_digest: as the summary should have it.
        settings_digest: likewise.
    """
    names = work.names(STAGED_FOLDER)
    if STAGED_SUMMARY in names:
        summary = _summary(work)
        if summary is not None and (summary.input_digest, summary.settings_digest) == (input_digest, settings_digest):
            damaged = changed_parts(work, summary.parts)
            if not damaged:
                return summary
            for name in damaged.keys() & set(names):
                set_aside(work, name, damaged[name])
    # The parts stay: without the summary they mean nothing, and another run of the job may be writing them.
    work.delete([STAGED_SUMMARY])
    return None


def changed_parts(work: Store, parts: Sequence[StagedPart]) -> dict[str, str]:
    """The staged parts that are not what the summary says, and what is wrong with each."""
    there = set(work.names(STAGED_FOLDER))

    def fault(part: StagedPart) -> str | None:
        if part.name not in there:
            return "it is missing"
        found = work.digest(part.name)
        return None if found == part.digest else f"expected digest {part.digest}, found {found}"

    with ThreadPoolExecutor(READERS, thread_name_prefix="staged-check") as readers:
        faults = zip(parts, readers.map(fault, parts), strict=True)
        return {part.name: found for part, found in faults if found is not None}


def _summary(work: Store) -> StageSummary | None:
    try:
        return StageSummary.model_validate_json(work.read_bytes(STAGED_SUMMARY))
    except ValidationError as error:
        set_aside(work, STAGED_SUMMARY, f"not a summary: {error.errors(include_url=False)[0]['msg']}")
        return None
