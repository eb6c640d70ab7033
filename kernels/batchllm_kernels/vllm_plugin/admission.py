"""Admission by predicted peak KV use, and what it would cost to compute a request again."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from vllm.v1.request import RequestStatus

from batchllm_kernels.vllm_plugin.admitted_requests import AdmittedRequests
from batchllm_kernels.vllm_plugin.kv_forecast import peak_blocks
from batchllm_kernels.vllm_plugin.options import SchedulerOptions
from batchllm_kernels.vllm_plugin.output_estimates import LearntEstimates
from batchllm_kernels.vllm_plugin.planned import expected_output_tokens, prefix_tokens
from batchllm_kernels.vllm_plugin.resident_blocks import ResidentBlocks
from batchllm_kernels.vllm_plugin.spread_ends import ends_apart

if TYPE_CHECKING:
    from vllm.v1.request import Request

_ENDED_BY_ITSELF = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_REPETITION,
)
"""Statuses of a request that ended by itself: it tells how long an output is, which an aborted request does not."""
_PIN = "pinned prefix"
"""The holder of the pinned blocks in `ResidentBlocks`; no request has this id."""
_PIN_TO_COME = "prefix to pin"
"""The holder of the blocks that will be pinned once a candidate runs; no request has this id."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What an engine can hold, and compute in a step."""

    block_size: int
    """Tokens of a KV block."""
    capacity_blocks: int
    """Blocks of the KV cache."""
    step_tokens: int
    """Most tokens of a step."""
    long_prefill_tokens: int
    """Most tokens of one prompt in a step; 0: no other limit than `step_tokens`."""
    max_model_tokens: int
    """Most tokens of a request, prompt and output, where vLLM ends it whatever its `max_tokens`."""
    late_steps: int
    """Steps that are scheduled before the end of a request is known."""


class Admission:
    """Knows what the running requests hold and when they will let go of it.

    Args:
        options: which mechanisms are on, and what share of the cache stays free.
        limits: what the engine can hold and compute.
    """

    def __init__(self, options: SchedulerOptions, limits: AdmissionLimits) -> None:
        self._options = options
        self._limits = limits
        self._usable = limits.capacity_blocks - int(options.watermark * limits.capacity_blocks)
        self._admitted = AdmittedRequests()
        self._prefilling: dict[str, Request] = {}
        """Requests with more than a token to compute before they generate, by id, in the order of their admission."""
        self._columns_are_old = False
        self.ends = 0
        """Requests that have ended or were preempted so far."""
        self._residents = ResidentBlocks()
        self._estimates = LearntEstimates()

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._admitted

    @property
    def prefilling(self) -> Collection[Request]:
        """Admitted requests with more than a token to compute before they generate, in the order of admission."""
        return self._prefilling.values()

    def new_step(self) -> None:
        """A step begins: what requests have computed and generated has changed; it stays the same within the step."""
        self._columns_are_old = True
        done = [one.request_id for one in self._prefilling.values() if _uncomputed(one) <= 1]
        for request_id in done:
            del self._prefilling[request_id]

    def begin(self, request: Request) -> None:
        """Take note that the request runs now."""
        self._admit(request)

    def end(self, request: Request) -> None:
        """Take note that the request is finished or preempted, and that its blocks are freed."""
        if request not in self:
            return
        self.ends += 1
        estimate = int(self._admitted.estimates[self._admitted.row(request.request_id)])
        self._forget(request)
        if request.status in _ENDED_BY_ITSELF and self._options.correct_estimates and request.num_output_tokens > 0:
            self._estimates.observe(estimate, request.num_output_tokens)

    def pin(self, chain: Sequence[Hashable]) -> None:
        """Take note that these blocks are pinned now, and no others."""
        if chain:
            self._residents.hold(_PIN, chain)
        else:
            self._residents.drop(_PIN)

    def fits(self, request: Request, free_blocks: int, waiting: int) -> bool:
        """Whether the cache holds what runs and this request at the worst moment from now on, and is used well.

        Args:
            request: one that does not run.
            free_blocks: blocks of the cache that nobody holds now.
            waiting: how many requests wait, this one included.
        """
        blocks = self._shareable_blocks(request)
        tail = request.num_tokens + request.num_output_placeholders - blocks * self._limits.block_size
        needed_now = self._residents.missing(request.block_hashes[:blocks]) + self._blocks(tail)
        if needed_now > free_blocks:
            return False
        if self._columns_are_old:
            self._admitted.read_tails(self.prefilling)
            self._expect(slice(None))
            self._columns_are_old = False
        held = self._residents.blocks + self._blocks_of(self._admitted.tails)
        # Blocks in use that no running request accounts for: two copies of one prefix, say.
        unaccounted = max(self._limits.capacity_blocks - free_blocks - held, 0)
        prefix = prefix_tokens(request)
        pinned_tokens = prefix if self._options.pin_prefixes else 0
        first_blocks, last_blocks = self._admit(request)
        self._residents.hold(_PIN_TO_COME, request.block_hashes[: pinned_tokens // self._limits.block_size])
        try:
            # Where lengths are not known, room left for later would only be lost, and members of a group had better run
            # together while their prefix is there.
            spread = self._options.spread_ends and prefix == 0 and self._estimates.are_steady
            if spread and not ends_apart(
                self._admitted.to_come,
                self._admitted.work,
                first_blocks=first_blocks,
                last_blocks=last_blocks,
                waiting=waiting,
                capacity_blocks=self._usable,
            ):
                return False
            return self._peak_is_at_most(self._usable - unaccounted)
        finally:
            self._residents.drop(_PIN_TO_COME)
            self._forget(request)

    def recompute_tokens(self, request: Request) -> int:
        """How many tokens a preemption of this running request would cost: those whose KV nobody else keeps."""
        blocks = self._residents.exclusive(request.request_id)
        own = blocks * self._limits.block_size + self._admitted.tail(request)
        computed: int = request.num_computed_tokens
        return min(own, computed)

    def may_run_out(self, running: Sequence[Request], free_blocks: int) -> bool:
        """Whether the running requests might need more blocks in the next step than are free.

        Args:
            running: all requests that run.
            free_blocks: blocks of the cache that nobody holds now.
        """
        to_prefill = sum(_uncomputed(one) for one in self.prefilling)
        if len(running) + to_prefill // self._limits.block_size <= free_blocks:
            return False  # A request that generates needs a block at most.
        needed = 0
        for request in running:
            if request.num_output_tokens + request.num_output_placeholders < request.max_tokens:
                computed = request.num_computed_tokens
                known = request.num_tokens + request.num_output_placeholders
                after = min(known, computed + self._limits.step_tokens)
                needed += self._blocks(after) + (-computed // self._limits.block_size)
        return bool(free_blocks < needed)

    def _admit(self, request: Request) -> tuple[int, int]:
        """Give the request the last row; returns the blocks that it adds when it begins, and when it ends."""
        blocks = self._shareable_blocks(request)
        held_before = self._residents.blocks
        most = max(min(request.max_tokens, self._limits.max_model_tokens - request.num_prompt_tokens), 1)
        self._admitted.add(
            request,
            estimate=expected_output_tokens(request, most),
            most=most,
            shared_tokens=blocks * self._limits.block_size,
            run=self._residents.hold(request.request_id, request.block_hashes[:blocks]),
        )
        self._expect(slice(-1, None))
        missing = self._residents.blocks - held_before
        tail, to_come = int(self._admitted.tails[-1]), int(self._admitted.to_come[-1])
        first, last = missing + self._blocks(tail), missing + self._blocks(tail + to_come - 1)
        self._admitted.work[-1] = to_come * (first + last) // 2
        if _uncomputed(request) > 1:
            self._prefilling[request.request_id] = request
        return first, last

    def _forget(self, request: Request) -> None:
        self._admitted.remove(request.request_id)
        self._residents.drop(request.request_id)
        self._prefilling.pop(request.request_id, None)

    def _expect(self, rows: slice) -> None:
        """Forecast how many output tokens the requests in these rows will yet have."""
        generated = self._admitted.generated[rows]
        expected = self._estimates.expected(self._admitted.estimates[rows], generated, self._admitted.most[rows])
        self._admitted.to_come[rows] = np.maximum(expected - generated, 1)

    def _peak_is_at_most(self, blocks: int) -> bool:
        """Whether the admitted requests and the pins never need more blocks than these."""
        tails = self._admitted.tails
        # The KV of the last token is never stored.
        final_tails = tails + self._admitted.to_come - 1
        if self._residents.blocks + self._blocks_of(final_tails) <= blocks:
            return True  # even if all of them came to their end in the same step
        ends = self._admitted.to_come + self._limits.late_steps
        rows = [self._admitted.row(request_id) for request_id in self._prefilling]
        ends[rows] += self._prefill_steps()
        pins = [self._residents.run_of(holder) for holder in (_PIN, _PIN_TO_COME) if holder in self._residents]
        run_blocks, run_last = self._residents.until(
            np.append(self._admitted.runs, pins), np.append(ends, [ends.max()] * len(pins))
        )
        return peak_blocks(ends, tails, final_tails, run_blocks, run_last, block_size=self._limits.block_size) <= blocks

    def _prefill_steps(self) -> npt.NDArray[np.int64]:
        """Most steps before the one that brings the next token of each request in `prefilling`, int64 [P].

        Prompts are computed in the order of the requests, with what one token for each of the others leaves of the
        budget; a limit for long prompts adds the steps in which that limit binds.
        """
        uncomputed = np.array([_uncomputed(one) for one in self._prefilling.values()], dtype=np.int64)
        left = max(self._limits.step_tokens - len(self._admitted) + 1, 1)
        steps = -(-uncomputed.cumsum() // left)
        if self._limits.long_prefill_tokens:
            steps += -(-uncomputed // self._limits.long_prefill_tokens)
        return steps - 1

    def _shareable_blocks(self, request: Request) -> int:
        """How many full blocks of its prompt a request may share."""
        if request.skip_reading_prefix_cache:
            return 0
        # vLLM computes the last token of a prompt in any case: a block that ends with it is never taken from the cache.
        return int((request.num_prompt_tokens - 1) // self._limits.block_size)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._limits.block_size)

    def _blocks_of(self, tokens: npt.NDArray[np.int64]) -> int:
        """Blocks that hold these numbers of tokens, none of them shared."""
        return int((-(-tokens // self._limits.block_size)).sum())


def _uncomputed(request: Request) -> int:
    return int(request.num_tokens - request.num_computed_tokens)
