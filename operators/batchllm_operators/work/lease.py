"""`lease.json`: which run works on a work folder now; others see it renewed, or not renewed any more."""

from __future__ import annotations

from datetime import datetime

from batchllm_operators.process_identity import ProcessIdentity
from batchllm_operators.records import InputObject, Record
from batchllm_operators.store import Store
from batchllm_operators.work.json_objects import read_record
from batchllm_operators.work.layout import LEASE_FILE


class Lease(Record):
    """What the object holds."""

    token: str
    """Of the run; no other has it."""
    fence: int
    """Grows by one with each run that takes the lease over: a run that finds a greater one than its own has lost it."""
    beat: int
    """Grows by one with each renewal."""
    since: datetime
    """When the run took it, by its clock."""
    renewed: datetime
    """When it was renewed last, by the same clock."""
    process: ProcessIdentity
    flow_run: str | None = None
    """Id of the run in Prefect."""

    def holder(self) -> str:
        """Who has it, for a person."""
        flow = f", flow run {self.flow_run}" if self.flow_run else ""
        return (
            f"process {self.process.pid} on {self.process.host}{flow}, since {self.since:%Y-%m-%d %H:%M:%S} UTC,"
            f" last heard of {self.renewed:%Y-%m-%d %H:%M:%S} UTC"
        )


def read_lease(work: Store) -> Lease | None:
    """The lease of a work folder; None where no run has it, or what is there is none."""
    return read_record(Lease, work, LEASE_FILE, only_looks=True)


def write_lease(work: Store, lease: Lease, expected: InputObject | None) -> bool:
    """Write the lease, but only in the place of the object that is expected there; see `Store.write_if`."""
    return work.write_if(LEASE_FILE, lease.model_dump_json(indent=2).encode(), expected)
