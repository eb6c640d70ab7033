"""The KV blocks that requests hold, each counted once however many requests share it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from batchllm_kernels.arrays import Int64s


@dataclass(slots=True, eq=False)
class _Run:
    """Consecutive blocks that the same holders share: a node of the radix tree."""

    hashes: list[Hashable]
    parent: _Run | None
    number: int
    """The index of this run in the columns of the tree."""
    children: dict[Hashable, _Run] = field(default_factory=dict)
    holders: set[str] = field(default_factory=set)
    """The holders whose chain ends with this run."""


class ResidentBlocks:
    """A radix tree over chains of block hashes: who holds which full prompt blocks.

    A block's hash covers all tokens before it (vLLM's `Request.block_hashes`), so equal hashes are equal blocks, and
    two chains share blocks from the front only. There are at most two runs for each holder, and the root.
    """

    def __init__(self) -> None:
        self._root = _Run([], None, 0)
        self._ends: dict[str, _Run] = {}
        self._blocks = 0
        # Both columns are indexed by the number of a run; a number that is free has no blocks.
        self._lengths = np.zeros(64, dtype=np.int64)
        self._parents = np.zeros(64, dtype=np.int64)
        self._numbers = 1
        self._free_numbers: list[int] = []

    @property
    def blocks(self) -> int:
        """How many blocks anybody holds."""
        return self._blocks

    def __contains__(self, holder: str) -> bool:
        return holder in self._ends

    def hold(self, holder: str, chain: Sequence[Hashable]) -> int:
        """Let a holder share the blocks of a chain; what it held before is dropped.

        Returns:
            The number of the run where the chain ends, the same until the holder drops.
        """
        self.drop(holder)
        run, matched, within = self._walk(chain)
        if within < len(run.hashes):
            run = self._split(run, within)
        if matched < len(chain):
            run = self._new_run(list(chain[matched:]), run)
            self._blocks += len(run.hashes)
        run.holders.add(holder)
        self._ends[holder] = run
        return run.number

    def drop(self, holder: str) -> None:
        """Let go of what a holder shares; nothing happens when it holds nothing."""
        run = self._ends.pop(holder, None)
        if run is None:
            return
        run.holders.discard(holder)
        while run.parent is not None and not run.holders and not run.children:
            del run.parent.children[run.hashes[0]]
            self._blocks -= len(run.hashes)
            self._give_back(run)
            run = run.parent
        if run.parent is not None and not run.holders and len(run.children) == 1:
            (child,) = run.children.values()
            self._place(child, run.hashes + child.hashes, run.parent)
            self._give_back(run)

    def run_of(self, holder: str) -> int:
        """The number of the run where a holder's chain ends."""
        return self._ends[holder].number

    def missing(self, chain: Sequence[Hashable]) -> int:
        """How many blocks of a chain nobody holds."""
        return len(chain) - self._walk(chain)[1]

    def exclusive(self, holder: str) -> int:
        """How many blocks this holder alone keeps."""
        run: _Run | None = self._ends[holder]
        blocks = 0
        # An upper run belongs to this holder alone when the run below is the only thing that hangs on it.
        while run is not None and len(run.holders) + len(run.children) <= 1:
            blocks += len(run.hashes)
            run = run.parent
        return blocks

    def until(self, runs: Int64s, ends: Int64s) -> tuple[Int64s, Int64s]:
        """The blocks of each run, and how long somebody holds them.

        Args:
            runs: int64 [H], the number of the run where the chain of each holder ends; no holder may be left out.
            ends: int64 [H], step in which each holder lets go, at least 0.

        Returns:
            int64 [S] blocks of each run, and int64 [S] the last step in which someone holds it.
        """
        last = np.zeros(self._numbers, dtype=np.int64)
        while len(runs):  # one level up at a time, with only those holders that stay longer than any seen at that level
            longer = ends > last[runs]
            runs, ends = runs[longer], ends[longer]
            np.maximum.at(last, runs, ends)
            runs = self._parents[runs]
        return self._lengths[: self._numbers], last

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
        upper = self._new_run(run.hashes[:at], run.parent)
        self._place(run, run.hashes[at:], upper)
        return upper

    def _new_run(self, hashes: list[Hashable], parent: _Run) -> _Run:
        if self._free_numbers:
            number = self._free_numbers.pop()
        else:
            number = self._numbers
            self._numbers += 1
            if number == len(self._lengths):
                self._lengths = np.concatenate([self._lengths, np.zeros_like(self._lengths)])
                self._parents = np.concatenate([self._parents, np.zeros_like(self._parents)])
        run = _Run(hashes, parent, number)
        self._place(run, hashes, parent)
        return run

    def _place(self, run: _Run, hashes: list[Hashable], parent: _Run) -> None:
        """Put a run with these blocks below this parent, in place of the run there that began with the same block."""
        run.hashes = hashes
        run.parent = parent
        parent.children[hashes[0]] = run
        self._lengths[run.number] = len(hashes)
        self._parents[run.number] = parent.number

    def _give_back(self, run: _Run) -> None:
        self._lengths[run.number] = 0
        self._free_numbers.append(run.number)


def _common(hashes: Sequence[Hashable], chain: Sequence[Hashable], start: int) -> int:
    """How many blocks of a run a chain continues with from `start` on; the first is known to be equal."""
    most = min(len(hashes), len(chain) - start)
    if hashes[:most] == chain[start : start + most]:
        return most
    low, high = 1, most
    while low < high:  # Hashes are chained: behind the first difference all are different.
        middle = (low + high + 1) // 2
        if hashes[middle - 1] == chain[start + middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
