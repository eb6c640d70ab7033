"""What is done with a damaged object of a work folder: one policy, whoever meets it.

An object is damaged when it is not what was written: its bytes have another digest, a page another checksum, or it has
not the schema of its kind, because it is another version's or somebody else's.

- A run that meets a damaged object of its own job sets it aside, and what it held is made again. So a part is checked
  whole before anything of it counts, whatever columns are wanted, and steps agree on which parts there are.
- Whoever only looks (status, another job that learns output lengths) leaves it where it is, and does without.
- `verify` tells of it and touches nothing.
- An object that was whole and is damaged when it is read again ends the step with a `DamagedObjectError`: what was
  decided by its first reading does not hold any more, and the next run sets it aside. The same goes for a bundle, which
  nothing but the next plan could make again.
"""

from __future__ import annotations

import logging
from pathlib import PurePosixPath
from uuid import uuid4

from batchllm_operators.errors import DamagedObjectError
from batchllm_operators.store import Store
from batchllm_operators.work.layout import QUARANTINE_FOLDER

_LOGGER = logging.getLogger(__name__)


def set_aside(work: Store, name: str, reason: DamagedObjectError | str) -> None:
    """Move an object to `quarantine/`, under a name that no other has, and warn.

    Args:
        work: the work folder.
        name: of the object.
        reason: what is wrong with it.
    """
    path = PurePosixPath(name)
    to = f"{QUARANTINE_FOLDER}/{path.with_name(f'{path.stem}-{uuid4().hex[:8]}{path.suffix}')}"
    work.move(name, to)
    why = reason.message if isinstance(reason, DamagedObjectError) else reason
    _LOGGER.warning("%s is damaged and now stands as %s; what it held is made again: %s", name, work.uri_of(to), why)


def leave_out(work: Store, name: str, reason: DamagedObjectError, *, only_looks: bool) -> None:
    """Do without a damaged object.

    Args:
        work: the work folder.
        name: of the object.
        reason: what is wrong with it.
        only_looks: the folder is another job's, or no run asks: then the object stays where it is; else it is set
            aside.
    """
    if only_looks:
        _LOGGER.warning("%s is damaged and left out: %s", work.uri_of(name), reason.message)
    else:
        set_aside(work, name, reason)


def quarantined(work: Store) -> list[str]:
    """Names of the objects that were set aside."""
    return work.names(QUARANTINE_FOLDER)
