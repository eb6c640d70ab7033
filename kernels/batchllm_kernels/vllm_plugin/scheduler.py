"""vLLM's scheduler with prefix groups, pins and admission by predicted KV use; `schedule()` itself stays vLLM's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import RequestStatus

from batchllm_kernels.vllm_plugin.admission import Admission, expected_output_tokens, planned_request, prefix_tokens
from batchllm_kernels.vllm_plugin.compat import check_vllm_version
from batchllm_kernels.vllm_plugin.options import STEP_TRACE_VARIABLE, SchedulerOptions
from batchllm_kernels.vllm_plugin.prefix_pin import PrefixPin
from batchllm_kernels.vllm_plugin.step_trace import StepTraceWriter

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger(__name__)

MOST_OVERTAKERS = 16
"""Requests that may go before a head that has to wait for memory."""
PAUSE_SHARE = 0.03
"""Of the life of a head that was refused: steps after which it is looked at again though nothing has ended."""
SHORTEST_PAUSE, LONGEST_PAUSE = 4, 32
"""In steps; a look takes 2 to 5 % of a step of a small model."""


class GatedQueue(FCFSRequestQueue):  # type: ignore[misc]  # mypy does not follow vLLM
    """First come, first served; true only when its head may be taken now.

    `Scheduler.schedule` asks for the truth of its waiting queue before it takes the head, and stops admitting when it
    is false. Length and iteration are those of the whole queue.
    """

    def __init__(self, may_take: Callable[[Request], bool]) -> None:
        super().__init__()
        self._may_take = may_take

    def __bool__(self) -> bool:
        return len(self) > 0 and self._may_take(self[0])

    def peek_request(self) -> Request:
        """The head, whether or not it may be taken."""
        return self[0]


class GroupScheduling(Scheduler):  # type: ignore[misc]  # mypy does not follow vLLM
    """What both schedulers of ours add to vLLM's.

    Requests come in the order of the plan, a group's members one after the other; `SamplingParams.extra_args` says
    which group a request belongs to (`PlannedRequest`). A request without that is a group of its own, expected to use
    up its `max_tokens`. Nothing starves: but for overtaking, whose number is limited, nothing is reordered.

    - Lead first: the head of the queue waits while a running request computes blocks that the head shares with it.
    - Pin: the group's prefix stays in the cache until the first request of another group is next; what the two share
      stays pinned for that one, so sibling groups keep their parent.
    - Admission: the head of the queue waits until the predicted peak of KV use leaves room for it.
    - Spread ends: where lengths have turned out as expected, singles that grow begin little by little.
    - Overtaking: while the head waits for room, a smaller request of its group runs, or a single for a single.
    - Victim: when memory runs out all the same, the request that costs least to compute again is preempted.

    Where these cannot work (see `_unsupported`) it is vLLM's scheduler, and says so in the log.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_vllm_version()
        super().__init__(*args, **kwargs)
        self._options = SchedulerOptions.from_additional_config(self.vllm_config.additional_config)
        trace_file = os.environ.get(STEP_TRACE_VARIABLE)
        self._step_trace = StepTraceWriter(Path(trace_file)) if trace_file else None
        self._pool = self.kv_cache_manager.block_pool
        self._capacity = self._pool.num_gpu_blocks - 1  # one is vLLM's null block
        self._admission = Admission(
            self._options,
            block_size=self.block_size,
            capacity_blocks=self._capacity,
            token_budget=self.max_num_scheduled_tokens,
            long_prefill_tokens=self.scheduler_config.long_prefill_token_threshold,
            max_model_tokens=self.max_model_len,
            late_steps=int(self.scheduler_config.async_scheduling),
        )
        self._pin = PrefixPin(self._pool)
        self._pinned_chain: list[Any] = []
        """Hashes of the pinned blocks."""
        self._lead: Request | None = None
        """First request of the group that was admitted from last."""
        self._overtaken = ""
        """Id of the head that requests behind it have overtaken."""
        self._overtakers = 0
        self._granted: str | None = None
        """Id of the head that may be taken in this step."""
        self._steps = 0
        self._refused: tuple[str, int, int] | None = None
        """Head for which there was no room, nor for any behind it: id, ends by then, pinned blocks. Without an end or a
        shorter pin, only time makes room: who begins later is still small when others are at their largest."""
        self._next_look = 0
        """Step in which the refused head is looked at again in any case."""
        self._unsupported = self._why_unsupported()
        if self._unsupported:
            logger.warning("BatchLLM scheduling is off: %s", self._unsupported)
        else:
            self.waiting = GatedQueue(self._may_take)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """vLLM's step; where memory may run out in it, the cheapest request stands last."""
        self._admission.new_step()
        self._granted = None
        self._steps += 1
        if not self._unsupported and self._options.cheapest_victim and self._memory_may_run_out():
            # vLLM preempts from the end of the running list.
            self.running.sort(key=self._admission.recompute_tokens, reverse=True)
        output = super().schedule(throttle_prefills)
        if not self._unsupported:
            self._follow_running()
            self._pin_prefix()
        if self._step_trace is not None:
            self._write_step(output, self._step_trace)
        return output

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """As vLLM's; the pin, which would keep the cache from being reset, is released first."""
        self._shorten_pin(0)
        return bool(super().reset_prefix_cache(reset_running_requests, reset_connector))

    def _free_request_blocks(self, request: Request) -> None:
        super()._free_request_blocks(request)
        self._admission.end(request)
        if request.is_finished() and len(self.requests) <= 1:
            # The last request there is.
            self._shorten_pin(0)
            self._lead = None
            if self._step_trace is not None:
                self._step_trace.pause()

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """As vLLM's: whether the head is ready; one that has just become so is not asked about before."""
        was_blocked = self._is_blocked_waiting_status(request.status)
        ready = bool(super()._handle_blocked_waiting_request(request))
        return ready and (not was_blocked or bool(self._unsupported) or self._may_admit(request))

    def _may_take(self, head: Request) -> bool:
        """Whether vLLM may look at the head: it passes over one whose grammar is not compiled yet, and so do we."""
        if self._is_blocked_waiting_status(head.status):
            return True
        if head.request_id == self._granted:
            return True  # vLLM asks more than once before it takes the head
        situation = (head.request_id, self._admission.ends, self._pin.blocks)
        looked_before = situation == self._refused
        if looked_before and self._steps < self._next_look:
            return False
        if not self._is_in_turn(head):
            return False
        if self._fits(head) or (not looked_before and self._overtake(head)):
            self._granted = self.waiting[0].request_id
            return True
        # The pin may be shorter by now.
        self._refused = (head.request_id, self._admission.ends, self._pin.blocks)
        pause = int(PAUSE_SHARE * expected_output_tokens(head, head.max_tokens))
        self._next_look = self._steps + min(max(pause, SHORTEST_PAUSE), LONGEST_PAUSE)
        return False

    def _may_admit(self, head: Request) -> bool:
        """Whether the head of the waiting queue may run."""
        return self._is_in_turn(head) and self._fits(head)

    def _is_in_turn(self, head: Request) -> bool:
        """Whether nothing but memory may stand in the way of the head; the pin makes room for it."""
        self._follow_running()
        same_group = self._lead is not None and _group(head) == _group(self._lead)
        if not self.running or (not same_group and head.num_preemptions == 0):
            # The group before is complete; or else nothing but the pin could stand in the head's way.
            self._shorten_pin(self._cached_blocks_of(head, self._pinned_chain))
        if not self.running:
            return True
        if len(self.running) + self.num_waiting_for_streaming_input >= self.max_num_active_reqs:
            return False  # as vLLM will say
        return not (self._options.lead_first and self._is_computed_by_another(head))

    def _fits(self, request: Request) -> bool:
        """Whether memory will do for what runs and this request; with nothing running there is no more to wait for."""
        if not self.running or not self._options.admit_by_peak:
            return True
        return self._admission.fits(request, self._pool.get_num_free_blocks(), len(self.waiting))

    def _overtake(self, head: Request) -> bool:
        """Put a request that fits before the head, which does not; false where there is none."""
        if not self._options.overtake or head.num_preemptions > 0:
            return False
        if head.request_id != self._overtaken:
            self._overtaken, self._overtakers = head.request_id, 0
        if self._overtakers == MOST_OVERTAKERS:
            return False
        place = next((place for place in self._free_places(head) if self._may_overtake(self.waiting[place])), None)
        if place is None:
            return False
        request = self.waiting[place]
        del self.waiting[place]
        self.waiting.appendleft(request)
        self._overtakers += 1
        return True

    def _free_places(self, head: Request) -> Iterator[int]:
        """Places behind the head, ever further apart, whose requests need no blocks but their own and their group's.

        Singles may overtake singles, and members of a group each other: a group stays together. A head that is nothing
        but its group's prefix computes it for the others at no cost of its own, so it stays first.
        """
        group, shared = _group(head), prefix_tokens(head) // self.block_size
        if self._most_cached_blocks(head) < shared:
            return
        place = 1
        while place < len(self.waiting) and (
            _group(self.waiting[place]) == group or shared == prefix_tokens(self.waiting[place]) == 0
        ):
            neighbours = [self.waiting[other] for other in (place - 1, place + 1) if other < len(self.waiting)]
            own = self.waiting[place].block_hashes[shared : shared + 1]
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

    def _follow_running(self) -> None:
        """Take note of the requests that vLLM has admitted since; they stand at the end of the running list."""
        for request in reversed(self.running):
            if request in self._admission:
                break
            self._admission.begin(request)
            if request.num_preemptions == 0 and self._makes_lead(request):
                self._lead = request

    def _makes_lead(self, request: Request) -> bool:
        lead = self._lead
        if lead is None or _group(request) != _group(lead):
            return True
        # The lead was aborted or preempted before the prefix was there.
        return bool(lead.status != RequestStatus.RUNNING and lead.num_computed_tokens < prefix_tokens(lead))

    def _is_computed_by_another(self, head: Request) -> bool:
        """Whether a running request is yet to compute the first block that the head would not find in the cache.

        What is computed in this very step is in the cache already, as far as vLLM's bookkeeping goes. A running request
        gets on with its prompt in every step that has tokens left for the head, so this comes to an end.
        """
        prefilling = self._admission.prefilling
        if not prefilling or head.skip_reading_prefix_cache:
            return False
        _, found_tokens, _ = self.kv_cache_manager.get_computed_blocks(head)
        found = found_tokens // self.block_size
        if found >= self._most_cached_blocks(head):
            return False
        # Hashes are chained: one that is equal stands for equal blocks up to there.
        wanted = [head.block_hashes[found]]
        until_found = found_tokens + self.block_size
        return any(
            one.num_computed_tokens < until_found and one.block_hashes[found : found + 1] == wanted
            for one in prefilling
        )

    def _pin_prefix(self) -> None:
        """Pin the prefix of the lead's group as soon as it is computed, or what the next group shares of it."""
        lead = self._lead
        if not self._options.pin_prefixes or lead is None or lead.status != RequestStatus.RUNNING:
            return
        blocks = prefix_tokens(lead) // self.block_size
        following = next((one for one in self.waiting if not self._is_blocked_waiting_status(one.status)), None)
        if following is not None and _group(following) != _group(lead):
            blocks = self._cached_blocks_of(following, lead.block_hashes[:blocks])
        if self._pin.blocks >= blocks or lead.num_computed_tokens < blocks * self.block_size:
            return
        # There may be copies: those that a member finds, not the lead's own.
        found = (self._pool.get_cached_block(block_hash, [0]) for block_hash in lead.block_hashes[:blocks])
        self._pin.move_to([copies[0] for copies in takewhile(bool, found)])
        self._pinned_chain = lead.block_hashes[: self._pin.blocks]
        self._admission.pin(self._pinned_chain)

    def _shorten_pin(self, blocks: int) -> None:
        if blocks < self._pin.blocks:
            self._pin.shorten_to(blocks)
            self._pinned_chain = self._pinned_chain[:blocks]
            self._admission.pin(self._pinned_chain)

    def _cached_blocks_of(self, request: Request, chain: list[Any]) -> int:
        """How many of these blocks a request will take from the cache."""
        most = min(len(chain), self._most_cached_blocks(request))
        pairs = zip(chain[:most], request.block_hashes[:most], strict=True)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _most_cached_blocks(self, request: Request) -> int:
        """vLLM computes a request's last token in any case, and with it the whole block."""
        return int((request.num_tokens - 1) // self.block_size)

    def _memory_may_run_out(self) -> bool:
        """Whether the running requests might need more blocks in this step than are free."""
        free_blocks = self._pool.get_num_free_blocks()
        to_prefill = sum(one.num_tokens - one.num_computed_tokens for one in self._admission.prefilling)
        if len(self.running) + to_prefill // self.block_size <= free_blocks:
            return False  # One that generates needs a block at most.
        needed = 0
        for request in self.running:
            if request.num_output_tokens + request.num_output_placeholders < request.max_tokens:
                computed = request.num_computed_tokens
                known = request.num_tokens + request.num_output_placeholders
                after = min(known, computed + self.max_num_scheduled_tokens)
                needed += -(-after // self.block_size) + (-computed // self.block_size)
        return bool(free_blocks < needed)

    def _write_step(self, output: SchedulerOutput, trace: StepTraceWriter) -> None:
        decode_tokens = 0
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            # Its counter stands behind this step already.
            if tokens == 1 and request.num_computed_tokens > request.num_prompt_tokens:
                decode_tokens += 1
        if output.total_num_scheduled_tokens:
            used = self._capacity - self._pool.get_num_free_blocks()
            trace.write(
                prefill_tokens=output.total_num_scheduled_tokens - decode_tokens,
                decode_tokens=decode_tokens,
                running=len(self.running),
                waiting=len(self.waiting),
                kv_tokens_used=used * self.block_size,
                kv_tokens_capacity=self._capacity * self.block_size,
                preempted=len(output.preempted_req_ids or ()),
            )

    def _why_unsupported(self) -> str | None:
        groups = self.kv_cache_config.kv_cache_groups
        if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
            kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
            return f"expected one KV cache group with full attention, the model has {len(groups)} of {kinds}"
        if self.hash_block_size != self.block_size:
            return f"expected block hashes of {self.block_size} tokens, got {self.hash_block_size}"
        if not self.cache_config.enable_prefix_caching:
            return "expected prefix caching"
        if self.connector is not None:
            return "expected no KV connector"
        if self.policy != SchedulingPolicy.FCFS:
            return f"expected the policy fcfs, got {self.policy.value}"
        return None


class BatchLLMScheduler(GroupScheduling):
    """For engines with `async_scheduling=False`."""


class AsyncBatchLLMScheduler(GroupScheduling, AsyncScheduler):  # type: ignore[misc]  # mypy does not follow vLLM
    """For engines with async scheduling."""


def _group(request: Request) -> str:
    planned = planned_request(request)
    return planned.group if planned else str(request.request_id)
