"""The KV blocks that requests hold, each counted once however many requests share it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class _Run:
    """Consecutive blocks that the same holders share: a node of the radix tree."""

    hashes: list[Hashable]
    parent: _Run | None
    children: dict[Hashable, _Run] = field(default_factory=dict)
    holders: set[str] = field(default_factory=set)
    """Those whose chain ends with this run."""
    last: int = 0
    """Scratch of `until`: the last step in which a run below is held."""


class ResidentBlocks:
    """A radix tree over chains of block hashes: who holds which full prompt blocks.

    A block's hash covers all tokens before it (vLLM's `Request.block_hashes`), so equal hashes are equal blocks, and
    two chains share blocks from the front only.
    """

    def __init__(self) -> None:
        self._root = _Run([], None)
        self._ends: dict[str, _Run] = {}
        self._blocks = 0

    @property
    def blocks(self) -> int:
        """Blocks that anybody holds."""
        return self._blocks

    def __contains__(self, holder: str) -> bool:
        return holder in self._ends

    def hold(self, holder: str, chain: Sequence[Hashable]) -> None:
        """Let a holder share the blocks of a chain; what it held before is dropped."""
        self.drop(holder)
        run, matched, within = self._walk(chain)
        if within < len(run.hashes):
            run = self._split(run, within)
        if matched < len(chain):
            child = _Run(list(chain[matched:]), run)
            run.children[chain[matched]] = child
            run = child
            self._blocks += len(run.hashes)
        run.holders.add(holder)
        self._ends[holder] = run

    def drop(self, holder: str) -> None:
        """Let go of what a holder shares; nothing happens when it holds nothing."""
        run = self._ends.pop(holder, None)
        if run is None:
            return
        run.holders.discard(holder)
        while run.parent is not None and not run.holders and not run.children:
            del run.parent.children[run.hashes[0]]
            self._blocks -= len(run.hashes)
            run = run.parent

    def missing(self, chain: Sequence[Hashable]) -> int:
        """Blocks of a chain that nobody holds."""
        return len(chain) - self._walk(chain)[1]

    def exclusive(self, holder: str) -> int:
        """Blocks that this holder alone keeps."""
        run: _Run | None = self._ends[holder]
        blocks = 0
        # An upper run is its alone when the run below is all that hangs on it.
        while run is not None and len(run.holders) + len(run.children) <= 1:
            blocks += len(run.hashes)
            run = run.parent
        return blocks

    def until(self, ends: Mapping[str, int]) -> tuple[Int64s, Int64s]:
        """Blocks and how long they stay.

        Args:
            ends: holder -> step in which it lets go; every holder must be in it.

        Returns:
            int64 [S] blocks of each run, and int64 [S] the last step in which someone holds it.
        """
        runs = [self._root]
        for run in runs:  # which grows meanwhile: parents come before children
            runs.extend(run.children.values())
        blocks = np.empty(len(runs), dtype=np.int64)
        last = np.empty(len(runs), dtype=np.int64)
        for place in range(len(runs) - 1, -1, -1):
            run = runs[place]
            end = run.last
            run.last = 0
            for holder in run.holders:
                end = max(end, ends[holder])
            if run.parent is not None and run.parent.last < end:
                run.parent.last = end
            blocks[place] = len(run.hashes)
            last[place] = end
        return blocks, last

    def _walk(self, chain: Sequence[Hashable]) -> tuple[_Run, int, int]:
        """The run where the common blocks of a chain end, how many there are, and how many of them are in that run."""
        run, matched, within = self._root, 0, 0
        while matched < len(chain) and within == len(run.hashes):
            child = run.children.get(chain[matched])
            if child is None:
                break
            run, within = child, _common(child.hashes, chain, matched)
            matched += within
        return run, matched, within

    def _split(self, run: _Run, at: int) -> _Run:
        """Cut a run in two; returns the upper part, which takes the place of the whole under the parent."""
        if run.parent is None:
            raise ValueError("expected a run below the root")
        upper = _Run(run.hashes[:at], run.parent)
        run.parent.children[upper.hashes[0]] = upper
        run.hashes = run.hashes[at:]
        run.parent = upper
        upper.children[run.hashes[0]] = run
        return upper


def _common(hashes: Sequence[Hashable], chain: Sequence[Hashable], start: int) -> int:
    """Blocks of a run that a chain goes on with from `start`; the first is known to be equal."""
    most = min(len(hashes), len(chain) - start)
    if hashes[:most] == chain[start : start + most]:
        return most
    low, high = 1, most
    while low < high:  # Hashes are chained: once different, always different.
        middle = (low + high + 1) // 2
        if hashes[middle - 1] == chain[start + middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
