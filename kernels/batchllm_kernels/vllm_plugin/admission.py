"""Admission by predicted peak KV use, and what it would cost to compute a request again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from vllm.v1.request import RequestStatus

from batchllm_kernels.vllm_plugin.kv_forecast import peak_blocks
from batchllm_kernels.vllm_plugin.options import PlannedRequest, SchedulerOptions
from batchllm_kernels.vllm_plugin.output_estimates import OutputEstimates
from batchllm_kernels.vllm_plugin.resident_blocks import ResidentBlocks

if TYPE_CHECKING:
    from vllm.v1.request import Request

_BY_ITSELF = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_REPETITION)
"""Ends that say how long an output is; an abort does not."""
_PIN = "pinned prefix"
"""Holder of the pinned blocks; no id of a request."""
_PIN_TO_COME = "prefix to pin"
"""Holder of the blocks that will be pinned for a candidate; no id of a request."""


@dataclass(frozen=True, slots=True)
class _Admitted:
    request: Request
    estimate: int
    """Output tokens that the plan expects, at least 1."""
    prompt_blocks: int
    """Full blocks of its prompt that may be shared."""
    prefix_blocks: int
    """Blocks that are pinned for its group."""


class Admission:
    """Knows what the running requests hold and when they will let go of it.

    Args:
        options: of the scheduler.
        block_size: tokens of a KV block.
        capacity_blocks: blocks of the cache.
        token_budget: most tokens of a step.
        long_prefill_tokens: most tokens of one prompt in a step; 0: no other limit than the budget.
        late_steps: steps that are scheduled before the end of a request is known.
    """

    def __init__(
        self,
        options: SchedulerOptions,
        *,
        block_size: int,
        capacity_blocks: int,
        token_budget: int,
        long_prefill_tokens: int,
        late_steps: int,
    ) -> None:
        self._options = options
        self._block_size = block_size
        self._capacity = capacity_blocks
        self._usable = capacity_blocks - int(options.watermark * capacity_blocks)
        self._token_budget = token_budget
        self._long_prefill_tokens = long_prefill_tokens
        self._late_steps = late_steps
        self._admitted: dict[str, _Admitted] = {}
        self._residents = ResidentBlocks()
        self._estimates = OutputEstimates()

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._admitted

    def begin(self, request: Request) -> None:
        """The request runs now."""
        one = self._describe(request)
        self._admitted[request.request_id] = one
        self._residents.hold(request.request_id, self._chain(one))

    def end(self, request: Request) -> None:
        """The request is finished or preempted, and its blocks are freed."""
        one = self._admitted.pop(request.request_id, None)
        if one is None:
            return
        self._residents.drop(request.request_id)
        if request.status in _BY_ITSELF and self._options.correct_estimates and request.num_output_tokens > 0:
            self._estimates.observe(one.estimate, request.num_output_tokens)

    def pin(self, chain: Sequence[Hashable]) -> None:
        """These blocks are pinned now, and no others."""
        if chain:
            self._residents.hold(_PIN, chain)
        else:
            self._residents.drop(_PIN)

    def fits(self, request: Request, free_blocks: int) -> bool:
        """Whether the cache holds what runs and this request at the worst moment from now on.

        Args:
            request: one that does not run.
            free_blocks: blocks of the cache that nobody holds now.
        """
        candidate = self._describe(request)
        needed_now = self._residents.missing(self._chain(candidate)) + self._blocks(self._tail(candidate))
        if needed_now > free_blocks:
            return False
        running = list(self._admitted.values())
        held = self._residents.blocks + sum(self._blocks(self._tail(one)) for one in running)
        # Blocks in use that no running request accounts for: two copies of one prefix, say.
        unaccounted = max(self._capacity - free_blocks - held, 0)
        self._residents.hold(request.request_id, self._chain(candidate))
        self._residents.hold(_PIN_TO_COME, request.block_hashes[: candidate.prefix_blocks])
        try:
            return self._peak([*running, candidate]) + unaccounted <= self._usable
        finally:
            self._residents.drop(_PIN_TO_COME)
            self._residents.drop(request.request_id)

    def recompute_tokens(self, request: Request) -> int:
        """Tokens to compute again should this running request be preempted: those whose KV nobody else keeps."""
        one = self._admitted[request.request_id]
        own = self._residents.exclusive(request.request_id) * self._block_size + self._tail(one)
        computed: int = request.num_computed_tokens
        return min(own, computed)

    def _peak(self, requests: list[_Admitted]) -> int:
        generated = np.array([_generated(one.request) for one in requests], dtype=np.int64)
        expected = self._estimates.expected(
            np.array([one.estimate for one in requests], dtype=np.int64),
            generated,
            np.array([one.request.max_tokens for one in requests], dtype=np.int64),
        )
        to_come = np.maximum(expected - generated, 1)
        ends = to_come + self._prefill_steps(requests) + self._late_steps
        tails = np.array([self._tail(one) for one in requests], dtype=np.int64)
        until = {one.request.request_id: int(end) for one, end in zip(requests, ends, strict=True)}
        run_blocks, run_last = self._residents.until(until | dict.fromkeys((_PIN, _PIN_TO_COME), int(ends.max())))
        # The KV of the last token is never stored.
        return peak_blocks(ends, tails, tails + to_come - 1, run_blocks, run_last, block_size=self._block_size)

    def _prefill_steps(self, requests: list[_Admitted]) -> npt.NDArray[np.int64]:
        """Most steps before the one that brings each request's next token, int64 [R].

        Prompts are computed in the order of the requests, with what one token for each of the others leaves of the
        budget; a limit for long prompts adds the steps in which that limit binds.
        """
        uncomputed = np.array([one.request.num_tokens - one.request.num_computed_tokens for one in requests])
        uncomputed[uncomputed <= 1] = 0
        left = max(self._token_budget - len(requests) + 1, 1)
        steps = -(-uncomputed.cumsum() // left)
        if self._long_prefill_tokens:
            steps += -(-uncomputed // self._long_prefill_tokens)
        return np.where(uncomputed > 0, steps - 1, 0)

    def _describe(self, request: Request) -> _Admitted:
        planned = PlannedRequest.from_extra_args(request.sampling_params.extra_args)
        estimate = planned.expected_output_tokens if planned else request.max_tokens
        # vLLM computes the last token of a prompt in any case: a block that ends with it is never taken from the cache.
        prompt_blocks = (request.num_prompt_tokens - 1) // self._block_size
        pinned = planned.prefix_tokens if planned and self._options.pin_prefixes else 0
        return _Admitted(request, max(estimate, 1), prompt_blocks, pinned // self._block_size)

    def _chain(self, one: _Admitted) -> Sequence[Hashable]:
        chain: Sequence[Hashable] = one.request.block_hashes[: one.prompt_blocks]
        return chain

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def _tail(self, one: _Admitted) -> int:
        """Tokens behind the full prompt blocks."""
        tokens: int = one.request.num_prompt_tokens - one.prompt_blocks * self._block_size + _generated(one.request)
        return tokens


def _generated(request: Request) -> int:
    """Output tokens, those included that steps under way will bring (async scheduling)."""
    tokens: int = request.num_output_tokens + request.num_output_placeholders
    return tokens
