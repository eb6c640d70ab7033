"""One run of a job at a time: a run holds a lease of its work folder, and renews it until it ends.

Two runs at once would do no harm, since answers are found by what was asked and the sink has a claim, but they would
pay twice. Where the store honours conditional writes just one of two runs gets the lease; elsewhere two that begin at
the same moment may both have it, find out at the next renewal, and go on side by side.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import TracebackType
from uuid import uuid4

from batchllm_operators.errors import BatchLLMError, TerminalError, TransientError
from batchllm_operators.process_identity import is_surely_gone, this_process
from batchllm_operators.specs.execution import OnConcurrent
from batchllm_operators.store import Store
from batchllm_operators.unfinished_removal import discard_unfinished
from batchllm_operators.work.layout import LEASE_FILE
from batchllm_operators.work.lease import Lease, read_lease, write_lease

RENEW_SECONDS = 15.0
"""Seconds between two renewals."""
STALE_SECONDS = 90.0
"""Seconds that a run looks at a lease which nobody renews, before it takes it over."""
SURELY_SILENT = timedelta(minutes=30)
"""Age of a lease by the clocks of two machines, which may differ by minutes, above which its run has ended."""
POLL_SECONDS = 2.0
"""Seconds between two looks at the lease of another run."""

_HELD: set[str] = set()
"""Tokens of the leases that runs of this process hold."""
_LOGGER = logging.getLogger(__name__)


class LostLeaseError(TerminalError):
    """Another run has taken the work folder over, because this one was not heard of for too long."""


def _unread(*_line: object) -> None:
    pass


class WorkLease:
    """The lease of one run; a context manager.

    Args:
        work: the work folder.
        on_concurrent: what to do where another run has it: `wait` until it ends or falls silent, `fail`, or `join`, go
            on without it.
        flow_run: id of the run in Prefect, for whoever looks.
        log: takes a line for a person, as `logging.Logger.info`; default: nobody reads it.

    Attributes:
        waited: whether another run had it at first: what it has done meanwhile is to be looked at.
    """

    def __init__(
        self, work: Store, on_concurrent: OnConcurrent, flow_run: str | None = None, log: Callable[..., None] = _unread
    ) -> None:
        self._work = work
        self._on_concurrent = on_concurrent
        self._log = log
        now = datetime.now(UTC)
        self._lease = Lease(
            token=uuid4().hex, fence=1, beat=0, since=now, renewed=now, process=this_process(), flow_run=flow_run
        )
        self._ended = threading.Event()
        self._renewing: threading.Thread | None = None
        self._lost_to: Lease | None = None
        self.waited = False

    def __enter__(self) -> WorkLease:
        """Take the lease.

        Raises:
            TerminalError: another run has it, and `on_concurrent` is `fail`.
            TransientError: the store does not answer, or others take it at the same moment, again and again.
        """
        _HELD.add(self._lease.token)  # before others of this process can see the lease
        taken = False
        try:
            taken = self._take()
        finally:
            if not taken:
                _HELD.discard(self._lease.token)
        if not taken:
            return self
        discard_unfinished(self._work)
        self._renewing = threading.Thread(target=self._renew_until_end, name="work-lease", daemon=True)
        self._renewing.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._renewing is None:
            return
        self._ended.set()
        self._renewing.join()
        try:
            if self._is_own(read_lease(self._work)):
                self._work.delete([LEASE_FILE])
        except BatchLLMError as fault:
            _LOGGER.warning("the lease is left behind, the next run will wait %g s: %s", STALE_SECONDS, fault)
        finally:
            # Not before the lease is gone: another run of this process would take it over while it is given up.
            _HELD.discard(self._lease.token)

    def require(self) -> None:
        """Look whether the work folder is still this run's to merge.

        Raises:
            LostLeaseError: another run has taken it over.
        """
        if self._renewing is None:
            return
        found = read_lease(self._work)
        taken_over = self._lost_to or found
        if taken_over is not None and not self._is_own(taken_over) and taken_over.fence > self._lease.fence:
            raise LostLeaseError(
                f"another run has taken this job over, because this one was not heard of for {STALE_SECONDS:g} s:"
                f" {taken_over.holder()}; its output will be complete",
                uri=self._work.uri,
            )

    def _take(self) -> bool:
        """Take the lease, perhaps after others; False: go on without it."""
        silent_since, seen = time.monotonic(), None
        while True:
            there = self._work.object(LEASE_FILE)
            other = read_lease(self._work)
            if other is None or _is_surely_over(other) or self._is_silent(seen, other, silent_since):
                fence = 1 if other is None else other.fence + 1
                self._lease = self._lease.model_copy(update={"fence": fence})
                if write_lease(self._work, self._lease, there):
                    if other is not None:
                        self._log("work folder: taken over from %s, which has ended", other.holder())
                    return True
                continue  # another run was faster: look who
            if self._on_concurrent == "join":
                self._log("work folder: another run of this job computes too: %s", other.holder())
                return False
            if self._on_concurrent == "fail":
                raise TerminalError(
                    f"execution.on_concurrent: another run of this job is under way: {other.holder()}",
                    uri=self._work.uri,
                )
            if not self.waited:
                self._log("work folder: waits for another run of this job: %s", other.holder())
            self.waited = True
            if seen is None or (seen.token, seen.beat) != (other.token, other.beat):
                silent_since, seen = time.monotonic(), other
            time.sleep(POLL_SECONDS)

    @staticmethod
    def _is_silent(seen: Lease | None, now: Lease, since: float) -> bool:
        """Whether nobody has renewed a lease for so long; by what is seen, as clocks of machines differ."""
        is_same = seen is not None and (seen.token, seen.beat) == (now.token, now.beat)
        return is_same and time.monotonic() - since > STALE_SECONDS

    def _renew_until_end(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                if not self._renew():
                    return
            except BatchLLMError as fault:
                # The store may be back before others take the lease over; the merge looks whether they have.
                _LOGGER.warning("the lease could not be renewed: %s", fault)

    def _renew(self) -> bool:
        """Write the lease anew; False: it is another run's."""
        there = self._work.object(LEASE_FILE)
        found = read_lease(self._work)
        if found is not None and not self._is_own(found):
            self._lost_to = found
            if found.fence <= self._lease.fence:
                _LOGGER.warning("another run of this job began at the same moment and computes too: %s", found.holder())
            return False
        renewed = self._lease.model_copy(update={"beat": self._lease.beat + 1, "renewed": datetime.now(UTC)})
        if write_lease(self._work, renewed, there):
            self._lease = renewed
        return True

    def _is_own(self, lease: Lease | None) -> bool:
        return lease is not None and lease.token == self._lease.token


def clear_after_killed_run(work: Store) -> None:
    """Remove what a run that was killed just before its end has left in a work folder whose job is complete."""
    if work.exists(LEASE_FILE):
        with WorkLease(work, "join"):
            pass


def _is_surely_over(lease: Lease) -> bool:
    """Whether the run of a lease has ended and could not give it up; False where that cannot be known."""
    if lease.process == this_process():
        return lease.token not in _HELD
    return is_surely_gone(lease.process)


def refuse_while_another_runs(work: Store) -> None:
    """Refuse work on a folder in which a run is under way.

    Raises:
        TransientError: one is, as far as can be told at once: not so where it was not heard of for `SURELY_SILENT`.
    """
    other = read_lease(work)
    if other is None or _is_surely_over(other) or datetime.now(UTC) - other.renewed > SURELY_SILENT:
        return
    raise TransientError(
        f"a run of this job is under way: {other.holder()}; `batchllm status` shows how far it is", uri=work.uri
    )
