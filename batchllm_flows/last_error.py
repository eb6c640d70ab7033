"""What a run failed with, kept in the work folder until a later run succeeds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from batchllm_operators.errors import BatchLLMError
from batchllm_operators.records import Record
from batchllm_operators.store import Store
from batchllm_operators.work.json_objects import read_record, write_record
from batchllm_operators.work.layout import LAST_ERROR_FILE

MESSAGE_CHARACTERS = 2000
_USER_OF_A_URL = re.compile(r"(?<=//)[^/\s@]+@")


class LastError(Record):
    """`last_error.json` of the work folder."""

    time: datetime
    kind: str
    """Class of the exception."""
    message: str


@contextmanager
def remembered_failure(work: Store, warn: Callable[..., None]) -> Iterator[None]:
    """Write the exception that leaves the block to the work folder; where none does, remove what an earlier run wrote.

    Args:
        work: the work folder; where it cannot be reached, the exception of the block is the one to tell.
        warn: takes a warning, as `logging.Logger.warning`.
    """
    try:
        yield
    except Exception as error:
        last = LastError(time=datetime.now(UTC), kind=type(error).__name__, message=_without_secrets(str(error)))
        _despite_faults(lambda: write_record(work, LAST_ERROR_FILE, last), warn)
        raise
    _despite_faults(lambda: work.delete([LAST_ERROR_FILE]), warn)


def read_last_error(work: Store) -> LastError | None:
    """What the last run failed with; None where it did not, or where another version wrote it."""
    return read_record(LastError, work, LAST_ERROR_FILE, only_looks=True)


def _despite_faults(write: Callable[[], None], warn: Callable[..., None]) -> None:
    try:
        write()
    except BatchLLMError as error:
        warn("%s is not up to date: %s", LAST_ERROR_FILE, error)


def _without_secrets(message: str) -> str:
    return _USER_OF_A_URL.sub("", message)[:MESSAGE_CHARACTERS]
