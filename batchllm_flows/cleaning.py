"""What nobody needs any more, found, listed and deleted: work folders, kept answers and unfinished writes.

A folder whose job may be running is never touched.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from batchllm_flows.work_folders import JobFolder, find_work_folders, job_folder
from batchllm_operators.answers import old_answers
from batchllm_operators.errors import TerminalError
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.store import Store
from batchllm_operators.store_entries import StoredObject
from batchllm_operators.unfinished_writes import UnfinishedWrite
from batchllm_operators.wording import counted, size_text
from batchllm_operators.work.layout import MANIFEST_FILE, REPORT_FILE

RUNNING_SECONDS = 2 * 3600.0
"""A folder written to within this time counts as a running job's, however little the user asks for: a job writes a part
every half minute while it computes, and nothing while an engine loads its model or stalls."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AGE = re.compile(r"(\d+)([smhdw])")


@dataclass(frozen=True)
class FoundFolder:
    """A work folder, and what is to be done with it."""

    work: Store
    job_name: str
    reason: str
    """Why it goes, or why it stays."""
    folders: tuple[str, ...] = ()
    """What goes: folders below it, or `.` for all of it; none where it stays."""
    bytes: int = 0
    objects: int = 0

    @property
    def goes(self) -> bool:
        """Whether there is something to delete."""
        return bool(self.folders)

    def line(self) -> str:
        """What is done with it, for a person."""
        if not self.goes:
            return f"keep    {self.work.uri}: {self.job_name}, {self.reason}"
        what = "" if self.folders == (".",) else f" ({', '.join(self.folders)})"
        return (
            f"delete  {self.work.uri}{what}: {self.job_name}, {self.reason}, {size_text(self.bytes)} in "
            f"{counted(self.objects, 'object')}"
        )


def parse_age(text: str) -> float:
    """Seconds of an age as `90m`, `12h`, `7d` or `2w`.

    Raises:
        ValueError: says what is expected.
    """
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"expected a number with one of the units s, m, h, d, w, as in 7d; got {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def find_old_folders(
    uri: str, storage: StorageOptions, older_than_s: float, now: float | None = None, *, required: bool = True
) -> list[FoundFolder]:
    """What `remove_folders` would delete of the work folders that a URI stands for, and what stays for which reason.

    Of a complete job its report stays, so that the job is still known to be complete and is not computed again; of one
    that was left unfinished nothing stays.

    Args:
        uri: of a sink, of a folder of work folders, or of one itself.
        storage: how to reach it.
        older_than_s: seconds without any write after which a folder is old; at least `RUNNING_SECONDS`.
        now: seconds since the epoch; default: the clock.

    Raises:
        TerminalError: there is no work folder, and one is required.
    """
    clock = time.time() if now is None else now
    age = max(older_than_s, RUNNING_SECONDS)
    return [_judged(work, clock - age) for work in find_work_folders(uri, storage, required=required)]


def remove_folders(found: list[FoundFolder]) -> None:
    """Delete what goes."""
    for one in found:
        for name in one.folders:
            (one.work if name == "." else one.work.folder(name)).remove()


@dataclass(frozen=True)
class Leftovers:
    """Kept answers that are too old, and what killed runs have left of objects that they did not finish."""

    folder: Store
    answers: tuple[StoredObject, ...]
    unfinished: tuple[UnfinishedWrite, ...]

    @property
    def objects(self) -> int:
        """How many objects go."""
        return len(self.answers) + len(self.unfinished)

    @property
    def bytes(self) -> int:
        """Their size, as far as a store tells it: that of unfinished writes is not known."""
        return sum(one.size for one in self.answers)

    def lines(self) -> list[str]:
        """What is deleted, for a person; nothing where there is nothing."""
        lines = []
        if self.answers:
            lines.append(f"delete  kept answers: {size_text(self.bytes)} in {counted(len(self.answers), 'object')}")
        if self.unfinished:
            lines.append(f"delete  what killed runs have left of {counted(len(self.unfinished), 'object')}")
        return [f"{line}, in {self.folder.uri}" for line in lines]

    def remove(self) -> None:
        """Delete them."""
        self.folder.delete([one.path for one in self.answers])
        self.folder.discard_writes(self.unfinished)


def find_leftovers(
    uri: str, storage: StorageOptions, older_than_s: float, answers_older_than_s: float | None, now: float | None = None
) -> Leftovers:
    """What `Leftovers.remove` would delete in a folder and below it.

    Args:
        uri: of a sink, of a folder of work folders, or of one of kept answers, as `execution.reuse` may name.
        storage: how to reach it.
        older_than_s: age of unfinished writes in seconds; at least `RUNNING_SECONDS`.
        answers_older_than_s: age in seconds above which kept answers go; None: they stay.
        now: seconds since the epoch; default: the clock.

    Raises:
        TerminalError: kept answers are asked for, and the folder is empty.
    """
    folder, clock = Store(uri, storage), time.time() if now is None else now
    began_before = clock - max(older_than_s, RUNNING_SECONDS)
    answers: list[StoredObject] = []
    if answers_older_than_s is not None:
        stored = folder.stored_objects()
        if not stored:
            raise TerminalError("there is nothing here to clean", uri=folder.uri)
        answers = old_answers(folder.uri, stored, datetime.fromtimestamp(max(clock - answers_older_than_s, 0), UTC))
    unfinished = [write for write in folder.unfinished_writes() if write.began < began_before]
    return Leftovers(folder, tuple(answers), tuple(unfinished))


def _judged(work: Store, written_before: float) -> FoundFolder:
    try:
        owner = job_folder(work)
    except TerminalError as error:
        return FoundFolder(work, "unknown job", error.message)
    objects = work.stored_objects()
    newest = max(one.modified for one in objects)
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(newest))
    if newest > written_before:
        return FoundFolder(work, owner.job_name, f"last written {written}: too young, or its job may be running")
    if _holds_data(owner, objects):
        return FoundFolder(work, owner.job_name, "input or output of the job stands in it")
    if owner.manifest() is None:
        what = "its output was replaced or removed since" if work.exists(REPORT_FILE) else "abandoned"
        return _going(owner, f"{what}, last written {written}", (".",), objects)
    if not work.exists(REPORT_FILE):
        # Without it a run would compute the complete job again, for which it needs what is here.
        return FoundFolder(work, owner.job_name, "complete without a report: run the job again, which writes it")
    inside = [one for one in objects if "/" in one.path]
    if not inside:
        return FoundFolder(work, owner.job_name, "complete, only its report is left")
    folders = tuple(sorted({one.path.partition("/")[0] for one in inside}))
    return _going(owner, f"complete, last written {written}", folders, inside)


def _going(owner: JobFolder, reason: str, folders: tuple[str, ...], objects: list[StoredObject]) -> FoundFolder:
    return FoundFolder(owner.work, owner.job_name, reason, folders, sum(one.size for one in objects), len(objects))


def _holds_data(owner: JobFolder, objects: list[StoredObject]) -> bool:
    """Whether the output, or the input, is in the folder: then nothing in it is ours to delete."""
    inside = f"{owner.work.uri}/"
    sink = Store(owner.sink.uri, owner.sink.storage).uri
    source = Store(owner.source_uri, owner.sink.storage).uri
    return (
        any(one.path.rpartition("/")[2] == MANIFEST_FILE for one in objects)
        or f"{sink}/".startswith(inside)
        or f"{source}/".startswith(inside)
    )
