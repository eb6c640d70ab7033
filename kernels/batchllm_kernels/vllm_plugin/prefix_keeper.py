"""Keeps the prefix of the group that is being admitted in the cache, until the next group needs the room."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from batchllm_kernels.vllm_plugin.planned import group_of, prefix_tokens
from batchllm_kernels.vllm_plugin.prefix_pin import PrefixPin

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

    from batchllm_kernels.vllm_plugin.admission import Admission


class PrefixKeeper:
    """Knows the lead, the request that computes the prefix of the current group, and pins that prefix.

    Args:
        pool: the engine's block pool.
        admission: is told which blocks are pinned.
        block_size: tokens of a KV block.
        pins: whether prefixes are pinned at all (`SchedulerOptions.pin_prefixes`).
    """

    def __init__(self, pool: BlockPool, admission: Admission, *, block_size: int, pins: bool) -> None:
        self._pool = pool
        self._admission = admission
        self._block_size = block_size
        self._pins = pins
        self._pin = PrefixPin(pool)
        self._chain: list[Any] = []
        """Hashes of the pinned blocks."""
        self._lead: Request | None = None
        """First request of the group that was admitted from last."""

    @property
    def pinned_blocks(self) -> int:
        """How many blocks are pinned."""
        return self._pin.blocks

    def begin(self, request: Request) -> None:
        """Take note of a request that vLLM has admitted; the first of its group becomes the lead."""
        lead = self._lead
        if lead is None or group_of(request) != group_of(lead):
            self._lead = request
        elif lead.status != RequestStatus.RUNNING and lead.num_computed_tokens < prefix_tokens(lead):
            # The lead was aborted or preempted before the prefix was there.
            self._lead = request

    def make_way_for(self, head: Request, *, nothing_runs: bool) -> None:
        """Release what the head of the queue does not share of the pin, where the pin may stand in its way.

        A head of another group means that the lead's group is complete. Where nothing runs, nothing but the pin could
        be in the way.
        """
        same_group = self._lead is not None and group_of(head) == group_of(self._lead)
        if nothing_runs or (not same_group and head.num_preemptions == 0):
            self._shorten_to(cached_blocks(head, self._chain, self._block_size))

    def pin_prefix(self, next_request: Request | None) -> None:
        """Pin the prefix of the lead's group as soon as it is computed.

        Args:
            next_request: the next request that may be admitted; None: there is none. Where it belongs to another
                group, what it shares of the prefix is pinned, and no more.
        """
        lead = self._lead
        if not self._pins or lead is None or lead.status != RequestStatus.RUNNING:
            return
        blocks = prefix_tokens(lead) // self._block_size
        if next_request is not None and group_of(next_request) != group_of(lead):
            blocks = cached_blocks(next_request, lead.block_hashes[:blocks], self._block_size)
        if self._pin.blocks >= blocks or lead.num_computed_tokens < blocks * self._block_size:
            return
        # There may be copies of a block: the pin takes the one that a member will find, not the lead's own.
        found = (self._pool.get_cached_block(block_hash, [0]) for block_hash in lead.block_hashes[:blocks])
        self._pin.move_to([copies[0] for copies in takewhile(bool, found)])
        self._chain = lead.block_hashes[: self._pin.blocks]
        self._admission.pin(self._chain)

    def release(self) -> None:
        """Let go of the pin."""
        self._shorten_to(0)

    def forget_group(self) -> None:
        """Let go of the pin and of the lead: the engine has no requests any more."""
        self.release()
        self._lead = None

    def _shorten_to(self, blocks: int) -> None:
        if blocks < self._pin.blocks:
            self._pin.shorten_to(blocks)
            self._chain = self._chain[:blocks]
            self._admission.pin(self._chain)


def cached_blocks(request: Request, chain: list[Any], block_size: int) -> int:
    """How many blocks of a chain of block hashes a request will take from the cache."""
    most = min(len(chain), most_cached_blocks(request, block_size))
    pairs = zip(chain[:most], request.block_hashes[:most], strict=True)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def most_cached_blocks(request: Request, block_size: int) -> int:
    """Most blocks that a request can find in the cache.

    vLLM computes the last token of a request in any case, and with it the whole block of that token.
    """
    return int((request.num_tokens - 1) // block_size)
