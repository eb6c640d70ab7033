"""vLLM's scheduler with prefix groups, pins and admission by predicted KV use; `schedule()` itself stays vLLM's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec

from batchllm_kernels.vllm_plugin.admission import Admission, AdmissionLimits
from batchllm_kernels.vllm_plugin.compat import check_vllm_version
from batchllm_kernels.vllm_plugin.head_gate import HeadGate
from batchllm_kernels.vllm_plugin.options import STEP_TRACE_VARIABLE, SchedulerOptions
from batchllm_kernels.vllm_plugin.prefix_keeper import PrefixKeeper
from batchllm_kernels.vllm_plugin.step_trace import StepTraceWriter

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger(__name__)


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
    """The methods of vLLM's scheduler that both schedulers of ours extend; the decisions are made elsewhere.

    Requests come in the order of the plan, a group's members one after the other; `SamplingParams.extra_args` says
    which group a request belongs to (`PlannedRequest`). A request without that is a group of its own, expected to use
    up its `max_tokens`. Nothing starves: but for overtaking, whose number is limited, nothing is reordered.

    - Lead first (`HeadGate`): the head of the queue waits while a running request computes blocks that the head shares
      with it.
    - Pin (`PrefixKeeper`): the group's prefix stays in the cache until the first request of another group is next; what
      the two share stays pinned for that one, so sibling groups keep their parent.
    - Admission (`Admission`): the head of the queue waits until the predicted peak of KV use leaves room for it.
    - Spread ends (`ends_apart`): where lengths have turned out as expected, singles that grow begin little by little.
    - Overtaking (`HeadGate`): while the head waits for room, a smaller request of its group runs, or a single for a
      single.
    - Victim: when memory runs out all the same, the request that costs least to compute again is preempted.

    Where these cannot work (see `_why_unsupported`) it is vLLM's scheduler, and says so in the log.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_vllm_version()
        super().__init__(*args, **kwargs)
        self._options = SchedulerOptions.from_additional_config(self.vllm_config.additional_config)
        trace_file = os.environ.get(STEP_TRACE_VARIABLE)
        self._step_trace = StepTraceWriter(Path(trace_file)) if trace_file else None
        pool = self.kv_cache_manager.block_pool
        limits = AdmissionLimits(
            block_size=self.block_size,
            capacity_blocks=pool.num_gpu_blocks - 1,  # one is vLLM's null block
            step_tokens=self.max_num_scheduled_tokens,
            long_prefill_tokens=self.scheduler_config.long_prefill_token_threshold,
            max_model_tokens=self.max_model_len,
            late_steps=int(self.scheduler_config.async_scheduling),
        )
        self._admission = Admission(self._options, limits)
        self._keeper = PrefixKeeper(pool, self._admission, block_size=self.block_size, pins=self._options.pin_prefixes)
        self._gate = HeadGate(self, self._admission, self._keeper, self._options)
        self._unsupported = _why_unsupported(self)
        if self._unsupported:
            logger.warning("BatchLLM scheduling is off: %s", self._unsupported)
        else:
            self.waiting = GatedQueue(self._may_take)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule a step as vLLM does; where memory may run out in it, the cheapest request to preempt stands last."""
        self._admission.new_step()
        self._gate.new_step()
        pool = self.kv_cache_manager.block_pool
        if (
            not self._unsupported
            and self._options.cheapest_victim
            and self._admission.may_run_out(self.running, pool.get_num_free_blocks())
        ):
            # vLLM preempts from the end of the running list.
            self.running.sort(key=self._admission.recompute_tokens, reverse=True)
        output = super().schedule(throttle_prefills)
        if not self._unsupported:
            self._gate.follow_running()
            self._keeper.pin_prefix(self._next_request())
        if self._step_trace is not None:
            _trace_step(self._step_trace, self, output)
        return output

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Reset the cache as vLLM does; the pin, which would keep it from being reset, is released first."""
        self._keeper.release()
        return bool(super().reset_prefix_cache(reset_running_requests, reset_connector))

    def _free_request_blocks(self, request: Request) -> None:
        super()._free_request_blocks(request)
        self._admission.end(request)
        if request.is_finished() and len(self.requests) <= 1:  # the last request there is
            self._keeper.forget_group()
            if self._step_trace is not None:
                self._step_trace.pause()

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether the head is ready, as vLLM finds; the gate is asked now about a head that has just become ready."""
        was_blocked = self._is_blocked_waiting_status(request.status)
        ready = bool(super()._handle_blocked_waiting_request(request))
        return ready and (not was_blocked or bool(self._unsupported) or self._gate.may_admit(request))

    def _may_take(self, head: Request) -> bool:
        """Whether vLLM may look at the head: it passes over one whose grammar is not compiled yet, and so do we."""
        return self._is_blocked_waiting_status(head.status) or self._gate.may_take(head)

    def _next_request(self) -> Request | None:
        """The first waiting request that vLLM would not pass over."""
        return next((one for one in self.waiting if not self._is_blocked_waiting_status(one.status)), None)


class BatchLLMScheduler(GroupScheduling):
    """The scheduler of engines with `async_scheduling=False`."""


class AsyncBatchLLMScheduler(GroupScheduling, AsyncScheduler):  # type: ignore[misc]  # mypy does not follow vLLM
    """The scheduler of engines with async scheduling."""


def _why_unsupported(scheduler: Scheduler) -> str | None:
    groups = scheduler.kv_cache_config.kv_cache_groups
    if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
        kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
        return f"expected one KV cache group with full attention, the model has {len(groups)} of {kinds}"
    if scheduler.hash_block_size != scheduler.block_size:
        return f"expected block hashes of {scheduler.block_size} tokens, got {scheduler.hash_block_size}"
    if not scheduler.cache_config.enable_prefix_caching:
        return "expected prefix caching"
    if scheduler.connector is not None:
        return "expected no KV connector"
    if scheduler.policy != SchedulingPolicy.FCFS:
        return f"expected the policy fcfs, got {scheduler.policy.value}"
    return None


def _trace_step(trace: StepTraceWriter, scheduler: Scheduler, output: SchedulerOutput) -> None:
    """Append what a step schedules to the trace; a step without a token is left out."""
    if not output.total_num_scheduled_tokens:
        return
    decode_tokens = 0
    for request_id, tokens in output.num_scheduled_tokens.items():
        request = scheduler.requests[request_id]
        # The counter of computed tokens includes this step already.
        if tokens == 1 and request.num_computed_tokens > request.num_prompt_tokens:
            decode_tokens += 1
    pool = scheduler.kv_cache_manager.block_pool
    capacity = pool.num_gpu_blocks - 1  # one is vLLM's null block
    trace.write(
        prefill_tokens=output.total_num_scheduled_tokens - decode_tokens,
        decode_tokens=decode_tokens,
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        kv_tokens_used=(capacity - pool.get_num_free_blocks()) * scheduler.block_size,
        kv_tokens_capacity=capacity * scheduler.block_size,
        preempted=len(output.preempted_req_ids or ()),
    )
