"""Keeps the KV blocks of one prefix in vLLM's cache, whoever else frees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


class PrefixPin:
    """Holds the leading blocks of a prompt, by one more reference in vLLM's own reference counts.

    Args:
        pool: the engine's block pool.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._blocks: list[KVCacheBlock] = []

    @property
    def blocks(self) -> int:
        """How many blocks are pinned."""
        return len(self._blocks)

    def move_to(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Pin these blocks, in the order of the prompt, in place of those pinned now; a block in both stays pinned."""
        self._pool.touch(blocks)
        self.shorten_to(0)
        self._blocks = list(blocks)

    def shorten_to(self, blocks: int) -> None:
        """Keep so many of the first blocks; vLLM evicts the rest in its turn, the end of the prompt first."""
        self._pool.free_blocks(reversed(self._blocks[blocks:]))
        del self._blocks[blocks:]
