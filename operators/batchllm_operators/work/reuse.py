"""`reuse.json`: which results of a work folder come from earlier runs."""

from __future__ import annotations

from batchllm_operators.records import AnsweredBefore, Record
from batchllm_operators.store import Store
from batchllm_operators.work.json_objects import read_record, write_record
from batchllm_operators.work.layout import REUSE_FILE


class Reuse(Record):
    """The result parts that other runs computed, and what is known of them."""

    taken_parts: tuple[str, ...] = ()
    """Result parts with answers of earlier runs."""
    answered: AnsweredBefore = AnsweredBefore()


def read_reuse(work: Store, *, only_looks: bool = False) -> Reuse:
    """What the object says; nothing where there is none, or a damaged one: then answers may be kept twice.

    Only the runs of the folder's own job write it.
    """
    return read_record(Reuse, work, REUSE_FILE, only_looks=only_looks) or Reuse()


def write_reuse(work: Store, reuse: Reuse) -> None:
    """Write the object anew."""
    write_record(work, REUSE_FILE, reuse)
