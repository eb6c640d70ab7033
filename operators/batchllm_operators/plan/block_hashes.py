"""Chained hashes of the full KV blocks of every prompt.

The hash of a block covers the block and everything before it, so two prompts share their first d blocks exactly when
their d-th hashes are equal. Hashes are 128 bits in two lanes that mix independently. They are not cryptographic, and
need not be: the engine finds shared KV by its own hashes over the tokens, so a collision here can only cost sharing
(a request placed beside a stranger), never an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchllm_operators.columns.arrays import Bools, Int32s, Int64s, UInt64s
from batchllm_operators.columns.compiled import compiled
from batchllm_operators.plan.disk_array import DiskArray

HASH_BYTES = 16

_COPIED_PROMPTS = 100_000

_SEED_A = np.uint64(0x9E3779B97F4A7C15)
_SEED_B = np.uint64(0xD1B54A32D192ED03)
_MULTIPLY_A = np.uint64(0xFF51AFD7ED558CCD)
_MULTIPLY_B = np.uint64(0xBF58476D1CE4E5B9)
_FINISH_A = np.uint64(0xC4CEB9FE1A85EC53)
_FINISH_B = np.uint64(0x94D049BB133111EB)
_LOW_HALF = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class BlockHashes:
    """Hashes of the full blocks of N prompts.

    Attributes:
        starts: int64 [N], where the hashes of each prompt begin in `lanes`.
        blocks: int32 [N], how many full blocks each prompt has.
        whole: bool [N], whether these blocks are the whole prompt.
        lanes: uint64 [at least the sum of blocks, 2].
        disk: where the lanes stand, when they are not in memory.
    """

    starts: Int64s
    blocks: Int32s
    whole: Bools
    lanes: UInt64s
    disk: DiskArray | None = None

    def of(self, prompts: Int64s) -> BlockHashes:
        """Hashes of some of the prompts."""
        return BlockHashes(self.starts[prompts], self.blocks[prompts], self.whole[prompts], self.lanes, self.disk)

    def levels(self, prompts: Int64s, first: int, count: int) -> BlockHashes:
        """A copy of the hashes number first..first + count of some prompts, at the same block numbers as here.

        Only those blocks of those prompts may be looked at in it.
        """
        prompts = np.sort(prompts)
        copied = np.clip(self.blocks[prompts] - first, 0, count).astype(np.int64)
        ends = np.cumsum(copied)
        begins = ends - copied
        lanes = np.empty((int(copied.sum()), 2), dtype=np.uint64)
        for low in range(0, len(prompts), _COPIED_PROMPTS):
            some = slice(low, low + _COPIED_PROMPTS)
            _copy_levels(self.lanes, self.starts[prompts[some]] + first, begins[some], ends[some], lanes)
            if self.disk is not None:
                self.disk.forget()
        starts = np.zeros_like(self.starts)
        starts[prompts] = begins - first
        return BlockHashes(starts, self.blocks, self.whole, lanes)


def hash_blocks(tokens: Int32s, offsets: Int64s, block_size: int) -> BlockHashes:
    """Hash the full blocks of N prompts.

    Args:
        tokens: int32, the prompts one after the other.
        offsets: int64 [N + 1] into `tokens`.
        block_size: tokens of a block.
    """
    blocks, rest = np.divmod(np.diff(offsets), block_size)
    block_offsets = np.zeros(len(offsets), dtype=np.int64)
    np.cumsum(blocks, out=block_offsets[1:])
    lanes = np.empty((int(block_offsets[-1]), 2), dtype=np.uint64)
    _hash_blocks(tokens, offsets, block_offsets, block_size, lanes)
    return BlockHashes(block_offsets[:-1], blocks.astype(np.int32), rest == 0, lanes)


@compiled
def _hash_blocks(tokens: Int32s, offsets: Int64s, block_offsets: Int64s, block_size: int, lanes: UInt64s) -> None:
    for prompt in range(len(offsets) - 1):
        a, b = _SEED_A, _SEED_B
        token = offsets[prompt]
        for block in range(block_offsets[prompt], block_offsets[prompt + 1]):
            end = token + block_size
            while token < end:
                # Two tokens at a time; an odd block ends with one.
                word = np.uint64(tokens[token]) & _LOW_HALF
                if token + 1 < end:
                    word |= np.uint64(tokens[token + 1]) << np.uint64(32)
                a = (a ^ word) * _MULTIPLY_A
                b = (b + word) * _MULTIPLY_B
                a ^= a >> np.uint64(29)
                b ^= b >> np.uint64(32)
                token += 2
            token = end
            a = (a ^ (a >> np.uint64(33))) * _FINISH_A
            b = (b ^ (b >> np.uint64(31))) * _FINISH_B
            lanes[block, 0] = a
            lanes[block, 1] = b


@compiled
def _copy_levels(lanes: UInt64s, sources: Int64s, begins: Int64s, ends: Int64s, copies: UInt64s) -> None:
    for prompt in range(len(sources)):
        for place in range(begins[prompt], ends[prompt]):
            source = sources[prompt] + place - begins[prompt]
            copies[place, 0] = lanes[source, 0]
            copies[place, 1] = lanes[source, 1]
