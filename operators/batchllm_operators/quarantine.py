"""The one thing that is done with a damaged object of a work folder: it is set aside, and made again."""

from __future__ import annotations

import logging
from pathlib import PurePosixPath
from uuid import uuid4

from batchllm_operators.errors import BatchLLMError
from batchllm_operators.records import QUARANTINE_FOLDER
from batchllm_operators.store import Store

_LOGGER = logging.getLogger(__name__)


def set_aside(work: Store, name: str, reason: BatchLLMError | str) -> None:
    """Move an object to `quarantine/`, under a name that no other has, and warn.

    Args:
        work: the work folder.
        name: of the object.
        reason: what is wrong with it.
    """
    path = PurePosixPath(name)
    to = f"{QUARANTINE_FOLDER}/{path.with_name(f'{path.stem}-{uuid4().hex[:8]}{path.suffix}')}"
    work.move(name, to)
    why = reason.message if isinstance(reason, BatchLLMError) else reason
    _LOGGER.warning("%s is damaged and now stands as %s; what it held is made again: %s", name, work.uri_of(to), why)
