"""What a stock engine's cache would save on any order of requests.

Replays requests through a cache of KV blocks as vLLM 0.32 keeps it (`BlockPool`): requests run a few at a time, the
blocks of running requests stay, those of finished ones are evicted least recently used first, the deepest block of a
request before those it continues.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchllm_operators.columns.arrays import Int32s, Int64s
from batchllm_operators.columns.compiled import compiled
from batchllm_operators.plan.prefix_order import PrefixOrder


@dataclass(frozen=True, slots=True)
class BlockNumbers:
    """The distinct full blocks of a job: the same number for the same block after the same prefix.

    Attributes:
        offsets: int64 [N + 1], where the blocks of a position begin and end.
        numbers: int32 [blocks].
        distinct: how many different ones there are.
    """

    offsets: Int64s
    numbers: Int32s
    distinct: int


def number_blocks(order: PrefixOrder, blocks: Int32s) -> BlockNumbers:
    """Number the distinct blocks.

    Args:
        order: the depth-first order.
        blocks: int32 [N], full blocks of the request at each position.
    """
    offsets = np.concatenate(([0], np.cumsum(blocks, dtype=np.int64)))
    numbers = np.empty(int(offsets[-1]), dtype=np.int32)
    distinct = _number_blocks(order.shared_blocks, blocks, offsets, numbers)
    return BlockNumbers(offsets, numbers, distinct)


def simulate_cache(
    positions: Int64s,
    blocks: BlockNumbers,
    usable_blocks: Int32s,
    *,
    capacity_blocks: int,
    own_blocks: Int32s | None = None,
    running: int = 1,
) -> Int32s:
    """Blocks that each request of an order finds in the cache.

    Args:
        positions: int64 [M], the requests in the order they are fed.
        blocks: of all requests, by position.
        usable_blocks: int32 [N], the most that a request may take: whole blocks, never its last token.
        capacity_blocks: blocks of the cache.
        own_blocks: int32 [N], further blocks that a request fills alone: the end of its prompt and its completion.
        running: requests that run at a time, as far as the cache has room.

    Returns:
        int32 [M].
    """
    if capacity_blocks < 1 or running < 1:
        raise ValueError(f"expected a cache of 1 block and 1 running request or more, got {capacity_blocks}, {running}")
    own = np.zeros(len(usable_blocks), dtype=np.int32) if own_blocks is None else own_blocks
    capacity = min(capacity_blocks, blocks.distinct + int(own.sum(dtype=np.int64)) + 1)
    return _replay(positions, blocks.offsets, blocks.numbers, blocks.distinct, usable_blocks, own, capacity, running)


@compiled
def _number_blocks(shared: Int32s, blocks: Int32s, offsets: Int64s, numbers: Int32s) -> int:
    distinct = 0
    for position in range(len(blocks)):
        here, before = offsets[position], offsets[position - 1] if position > 0 else 0
        for block in range(blocks[position]):
            if block < shared[position]:
                numbers[here + block] = numbers[before + block]
            else:
                numbers[here + block] = distinct
                distinct += 1
    return distinct


@compiled
def _replay(
    positions: Int64s,
    offsets: Int64s,
    numbers: Int32s,
    distinct: int,
    usable: Int32s,
    own: Int32s,
    capacity: int,
    running: int,
) -> Int32s:
    # A ring of evictable slots, oldest first: one slot for each distinct block, then anonymous ones for own blocks.
    ring = distinct + capacity
    after = np.full(ring + 1, -1, dtype=np.int32)
    before = np.full(ring + 1, -1, dtype=np.int32)
    after[ring] = before[ring] = ring
    users = np.zeros(distinct, dtype=np.int32)
    spare = np.arange(distinct, ring).astype(np.int32)
    spares = capacity
    hits = np.zeros(len(positions), dtype=np.int32)
    held = np.zeros(len(positions), dtype=np.int32)
    resident = oldest = 0
    for place in range(len(positions)):
        blocks = numbers[offsets[positions[place]] : offsets[positions[place] + 1]]
        wanted = len(blocks) + own[positions[place]]
        # Hits are taken before anything is evicted for the rest.
        taken = 0
        while taken < len(blocks) and _take(after, before, users, blocks[taken]):
            taken += 1
        hits[place] = min(taken, usable[positions[place]])
        while True:
            full = resident == capacity and after[ring] == ring
            if oldest < place and (place - oldest >= running or (full and taken < wanted)):
                finished = numbers[offsets[positions[oldest]] : offsets[positions[oldest] + 1]]
                spares = _release(after, before, users, finished, held[oldest], spare, spares)
                oldest += 1
                continue
            if full or taken == wanted:
                break  # full: larger than the cache; the rest runs, but is not kept
            if taken < len(blocks) and _take(after, before, users, blocks[taken]):
                taken += 1
                continue
            if resident < capacity:
                resident += 1
            else:
                evicted = after[ring]
                _unlink(after, before, evicted)
                if evicted >= distinct:
                    spare[spares] = evicted
                    spares += 1
            if taken < len(blocks):
                users[blocks[taken]] = 1
            taken += 1
        held[place] = taken
    return hits


@compiled
def _take(after: Int32s, before: Int32s, users: Int32s, block: int) -> bool:
    """Use a block if it is in the cache."""
    if users[block] == 0:
        if after[block] < 0:
            return False
        _unlink(after, before, block)
    users[block] += 1
    return True


@compiled
def _release(
    after: Int32s, before: Int32s, users: Int32s, blocks: Int32s, held: int, spare: Int32s, spares: int
) -> int:
    """Make what a finished request held evictable, its last block first; returns how many anonymous slots are left."""
    for _ in range(held - len(blocks)):
        spares -= 1
        _append(after, before, spare[spares])
    for block in blocks[:held][::-1]:
        users[block] -= 1
        if users[block] == 0:
            _append(after, before, block)
    return spares


@compiled
def _append(after: Int32s, before: Int32s, slot: int) -> None:
    ring = len(after) - 1
    last = before[ring]
    after[last], before[slot] = slot, last
    after[slot], before[ring] = ring, slot


@compiled
def _unlink(after: Int32s, before: Int32s, slot: int) -> None:
    after[before[slot]], before[after[slot]] = after[slot], before[slot]
    after[slot] = before[slot] = -1
