"""Decides whether vLLM may take the head of the waiting queue in this step, and who may overtake the head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from batchllm_kernels.vllm_plugin.planned import expected_output_tokens, group_of, prefix_tokens
from batchllm_kernels.vllm_plugin.prefix_keeper import most_cached_blocks

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from batchllm_kernels.vllm_plugin.admission import Admission
    from batchllm_kernels.vllm_plugin.options import SchedulerOptions
    from batchllm_kernels.vllm_plugin.prefix_keeper import PrefixKeeper

MOST_OVERTAKERS = 16
"""Requests that may go before a head that has to wait for memory."""
PAUSE_SHARE = 0.03
"""A refused head is looked at again after this share of the steps it will run for, though nothing has ended."""
SHORTEST_PAUSE, LONGEST_PAUSE = 4, 32
"""Bounds of that pause in steps; one look takes 2 to 5 % of a step of a small model."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What decides whether there is room for a head, but for the time that passes."""

    head: str
    """Id of the request."""
    ends: int
    """Requests that have ended or were preempted so far."""
    pinned_blocks: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """There was no room for the head, nor for any request behind it.

    In the same situation only time makes room: a request that begins later is still small when the others are at their
    largest.
    """

    situation: Situation
    next_look: int
    """Step in which the head is looked at again in any case."""


@dataclass(slots=True)
class Overtaken:
    """A head that requests behind it have overtaken."""

    head: str
    """Id of the request."""
    overtakers: int = 0


class HeadGate:
    """Says whether the head of the waiting queue may run, for `GroupScheduling`.

    Args:
        scheduler: vLLM's, whose `running` and `waiting` are read; an overtaker is put first in `waiting`.
        admission: whether memory will do.
        keeper: of the pinned prefix, which makes way for a head of another group.
        options: of the scheduler.
    """

    def __init__(
        self, scheduler: Scheduler, admission: Admission, keeper: PrefixKeeper, options: SchedulerOptions
    ) -> None:
        self._scheduler = scheduler
        self._admission = admission
        self._keeper = keeper
        self._options = options
        self._block_size: int = scheduler.block_size
        self._steps = 0
        self._granted: str | None = None
        """Id of the head that may be taken in this step."""
        self._refusal: Refusal | None = None
        self._overtaken = Overtaken("")

    def new_step(self) -> None:
        """A step begins: nothing is granted in it yet."""
        self._granted = None
        self._steps += 1

    def may_take(self, head: Request) -> bool:
        """Whether vLLM may take the head, or the request that this call has put before it."""
        if head.request_id == self._granted:
            return True  # vLLM asks more than once before it takes the head
        refusal = self._refusal
        refused_before = refusal is not None and refusal.situation == self._situation(head)
        if refusal is not None and refused_before and self._steps < refusal.next_look:
            return False
        if not self._is_in_turn(head):
            return False
        if self._fits(head) or (not refused_before and self._overtake(head)):
            self._granted = self._scheduler.waiting[0].request_id
            return True
        pause = int(PAUSE_SHARE * expected_output_tokens(head, head.max_tokens))
        next_look = self._steps + min(max(pause, SHORTEST_PAUSE), LONGEST_PAUSE)
        # The situation is asked for again: the pin may have become shorter meanwhile.
        self._refusal = Refusal(self._situation(head), next_look)
        return False

    def may_admit(self, head: Request) -> bool:
        """Whether the head may run, without anybody overtaking it."""
        return self._is_in_turn(head) and self._fits(head)

    def follow_running(self) -> None:
        """Take note of the requests that vLLM has admitted since; they stand at the end of the running list."""
        for request in reversed(self._scheduler.running):
            if request in self._admission:
                break
            self._admission.begin(request)
            if request.num_preemptions == 0:
                self._keeper.begin(request)

    def _situation(self, head: Request) -> Situation:
        return Situation(head.request_id, self._admission.ends, self._keeper.pinned_blocks)

    def _is_in_turn(self, head: Request) -> bool:
        """Whether nothing but memory may stand in the way of the head; the pin makes way for it."""
        scheduler = self._scheduler
        self.follow_running()
        self._keeper.make_way_for(head, nothing_runs=not scheduler.running)
        if not scheduler.running:
            return True
        if len(scheduler.running) + scheduler.num_waiting_for_streaming_input >= scheduler.max_num_active_reqs:
            return False  # as vLLM will say
        return not (self._options.lead_first and self._is_computed_by_another(head))

    def _fits(self, request: Request) -> bool:
        """Whether memory will do for what runs and this request; with nothing running there is no more to wait for."""
        scheduler = self._scheduler
        if not scheduler.running or not self._options.admit_by_peak:
            return True
        free_blocks = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return self._admission.fits(request, free_blocks, len(scheduler.waiting))

    def _is_computed_by_another(self, head: Request) -> bool:
        """Whether a running request is yet to compute the first block that the head would not find in the cache.

        What is computed in this very step is in the cache already, as far as vLLM's bookkeeping goes. A running request
        gets on with its prompt in every step that has tokens left for the head, so this comes to an end.
        """
        prefilling = self._admission.prefilling
        if not prefilling or head.skip_reading_prefix_cache:
            return False
        _, found_tokens, _ = self._scheduler.kv_cache_manager.get_computed_blocks(head)
        found = found_tokens // self._block_size
        if found >= most_cached_blocks(head, self._block_size):
            return False
        # Hashes are chained: an equal hash stands for equal blocks up to there.
        wanted = [head.block_hashes[found]]
        until_found = found_tokens + self._block_size
        return any(
            one.num_computed_tokens < until_found and one.block_hashes[found : found + 1] == wanted
            for one in prefilling
        )

    def _overtake(self, head: Request) -> bool:
        """Put a request that fits before the head, which does not fit; false where there is none."""
        if not self._options.overtake or head.num_preemptions > 0:
            return False
        if head.request_id != self._overtaken.head:
            self._overtaken = Overtaken(head.request_id)
        if self._overtaken.overtakers == MOST_OVERTAKERS:
            return False
        waiting = self._scheduler.waiting
        place = next((place for place in self._free_places(head) if self._may_overtake(waiting[place])), None)
        if place is None:
            return False
        request = waiting[place]
        del waiting[place]
        waiting.appendleft(request)
        self._overtaken.overtakers += 1
        return True

    def _free_places(self, head: Request) -> Iterator[int]:
        """Places behind the head, ever further apart, whose requests need no blocks but their own and their group's.

        Singles may overtake singles, and members of a group each other: a group stays together. A head that is nothing
        but its group's prefix computes it for the others at no cost of its own, so it stays first.
        """
        waiting = self._scheduler.waiting
        group, shared = group_of(head), prefix_tokens(head) // self._block_size
        if most_cached_blocks(head, self._block_size) < shared:
            return
        place = 1
        while place < len(waiting) and (
            group_of(waiting[place]) == group or shared == prefix_tokens(waiting[place]) == 0
        ):
            neighbours = [waiting[other] for other in (place - 1, place + 1) if other < len(waiting)]
            own = waiting[place].block_hashes[shared : shared + 1]
            if not own or all(one.block_hashes[shared : shared + 1] != own for one in neighbours):
                yield place
            place += 1 + place // 4

    def _may_overtake(self, request: Request) -> bool:
        return (
            request.status == RequestStatus.WAITING
            and request.num_preemptions == 0
            and not (self._options.lead_first and self._is_computed_by_another(request))
            and self._fits(request)
        )
