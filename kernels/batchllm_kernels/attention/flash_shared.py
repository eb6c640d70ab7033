"""Shared parts by FlashAttention 3: a plan's shared items as sequences of a variable-length call, on host and device.

Every split of a shared run is one sequence: its queries are those of all members, gathered one behind the other, and
all of them see all its keys. Runs are split by the plan, as for the Triton kernel, and never by FlashAttention: so it
needs neither room for splits nor a launch that combines them, and its results are taken in like all partial results.
What is queried and what comes out has 16 bits a number, and stands where the Triton kernel has its fp32 results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from batchllm_kernels.arrays import Int32s
from batchllm_kernels.attention.prefix_sharing import MAX_LEVELS
from batchllm_kernels.attention.work_plan import SharedItem, WorkPlan, WorkPlanShape

SharedImplementation = Literal["triton", "flash_attention_3"]

TILE_ROWS = 128  # rows (query tokens x heads of one KV head) of FlashAttention 3's tile for most head sizes
DTYPES = (torch.float16, torch.bfloat16)
HEAD_MULTIPLE = 8
HOPPER = 9  # major compute capability


class VarlenAttention(Protocol):
    """FlashAttention 3 on sequences over a paged cache: vLLM's, its library alone, or a stand-in of a test."""

    def scheduler_metadata(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        max_query_len: int,
        max_seq_len: int,
        causal: bool,
        splits: int,
    ) -> torch.Tensor:
        """How the work of a step is divided, int32 on the device; of query and cache only shape and dtype count."""

    def attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        block_table: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        max_query_len: int,
        max_seq_len: int,
        scale: float,
        causal: bool,
        splits: int,
        metadata: torch.Tensor | None,
        output: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, and the natural logarithm of the sum of exponentials, fp32 [heads, tokens]."""


@dataclass(frozen=True, slots=True)
class FlashSettings:
    """FlashAttention 3 for the shared parts of an engine.

    Attributes:
        attention: what to call.
        shape: of all plans.
        kv_heads: of this rank.
        dtype: of query and cache.
        max_blocks: blocks of the longest request.
        capacity: bounds that no plan exceeds.
    """

    attention: VarlenAttention
    shape: WorkPlanShape
    kv_heads: int
    dtype: torch.dtype
    max_blocks: int
    capacity: SequenceBounds


@dataclass(frozen=True, slots=True)
class SequenceBounds:
    """What a launch is made for: the numbers that FlashAttention takes from the host.

    A captured launch keeps them, so that a plan which is to be replayed must be loaded with the same.

    Attributes:
        sequences: splits of shared runs; those behind a plan's are empty.
        rows: gathered query tokens of all sequences.
        longest_query: query tokens of a sequence.
    """

    sequences: int
    rows: int
    longest_query: int

    @staticmethod
    def of_plan(plan: WorkPlan) -> SequenceBounds:
        """Just what a plan has."""
        starts = plan.shared_items[:, SharedItem.ROW_START]
        return SequenceBounds(
            sequences=int(np.isin(starts, plan.node_row_start[:-1]).sum()),
            rows=plan.partials - plan.own_partials,
            longest_query=int(np.diff(plan.node_row_start).max(initial=0)),
        )

    @staticmethod
    def of_steps(max_requests: int, shape: WorkPlanShape) -> SequenceBounds:
        """Room for every plan of so many rows, none of which can exceed it.

        Runs with two members or more that hold each other or have no member in common are fewer than the members.
        For the rest of the reasons see `PlanCapacity.of_steps`.
        """
        programs = shape.target_items
        runs = min(MAX_LEVELS * (max_requests // 2), max(max_requests - 1, 0))
        return SequenceBounds(
            sequences=runs + programs,
            rows=MAX_LEVELS * max_requests + min(shape.shared_tile_tokens, max_requests) * programs,
            longest_query=max_requests,
        )

    def holds(self, other: SequenceBounds) -> bool:
        """Whether launches for these bounds do for the others."""
        return all(getattr(other, name) <= getattr(self, name) for name in self.__dataclass_fields__)

    def at_most(self, other: SequenceBounds) -> SequenceBounds:
        """The smaller bound of each kind."""
        return SequenceBounds(*(min(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__))


@dataclass(frozen=True, slots=True)
class SharedSequences:
    """The shared parts of a plan as sequences, the longest first.

    Attributes:
        query_start_loc: int32 [sequences + 1], first gathered row of each.
        seq_lens: int32 [sequences], KV tokens.
        sources: int32 [sequences, 2], request whose block table row is read, and its first block.
        tokens: int32 [rows], query token of each gathered row.
        row_of_slot: int32 [partial slots], gathered row whose result is the shared part of a slot; 0 for the slots of
            own ranges, which no one looks up.
    """

    query_start_loc: Int32s
    seq_lens: Int32s
    sources: Int32s
    tokens: Int32s
    row_of_slot: Int32s


def shared_sequences(plan: WorkPlan) -> SharedSequences:
    """One sequence for each split of each shared run: all tiles of its rows together."""
    node_of_item = np.searchsorted(plan.node_row_start, plan.shared_items[:, SharedItem.ROW_START], side="right") - 1
    first_tile = plan.shared_items[:, SharedItem.ROW_START] == plan.node_row_start[node_of_item]
    items, node = plan.shared_items[first_tile], node_of_item[first_tile]
    rows = np.diff(plan.node_row_start)[node]
    start = np.append(0, rows.cumsum()).astype(np.int32)
    sequence = np.repeat(np.arange(len(items)), rows)
    shared_row = plan.shared_rows[plan.node_row_start[node][sequence] + np.arange(start[-1]) - start[sequence]]
    row_of_slot = np.zeros(plan.partials, dtype=np.int32)
    row_of_slot[shared_row[:, 1] + items[sequence, SharedItem.SPLIT]] = np.arange(start[-1])
    kv_start, kv_end = items[:, SharedItem.KV_START], items[:, SharedItem.KV_END]
    return SharedSequences(
        query_start_loc=start,
        seq_lens=kv_end - kv_start,
        sources=np.stack([items[:, SharedItem.REQUEST], kv_start // plan.block_size], axis=1),
        tokens=np.ascontiguousarray(shared_row[:, 0]),
        row_of_slot=row_of_slot,
    )


@dataclass(frozen=True, slots=True)
class SharedImplementationChoice:
    """What runs the shared parts of an engine, and why."""

    implementation: SharedImplementation
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation} ({self.reason})"


def choose_shared_implementation(
    *, compute_capability: int, dtype: torch.dtype, head_size: int, missing: str | None
) -> SharedImplementationChoice:
    """FlashAttention 3 wherever it runs, else the Triton kernel.

    On an H100 (benchmarks/results/attention.md) it is the faster one where 32 requests or more share a run, and about
    as fast with fewer.

    Args:
        compute_capability: major one of the device.
        dtype: of query and cache.
        head_size: numbers of a head.
        missing: why the library is not to be had, None where it is.
    """
    reason = missing
    if compute_capability != HOPPER:
        reason = f"FlashAttention 3 needs compute capability {HOPPER}, got {compute_capability}"
    elif dtype not in DTYPES:
        reason = f"FlashAttention 3 needs numbers of 16 bits, got {dtype}"
    elif head_size % HEAD_MULTIPLE:
        reason = f"FlashAttention 3 needs a multiple of {HEAD_MULTIPLE} as head size, got {head_size}"
    if reason is not None:
        return SharedImplementationChoice("triton", reason)
    return SharedImplementationChoice("flash_attention_3", "the faster one on Hopper for large groups")


class FlashShared:
    """The device side: tables at fixed addresses, and what FlashAttention reads and writes.

    Attributes:
        settings: as given.
        bounds: those that the last plan was loaded with.
        query_start_loc: int32 [sequences + 1]; sequences behind a plan's start and end where its last one ends.
        seq_lens: int32 [sequences]; 0 behind a plan's.
        sources, tokens, row_of_slot: as in `SharedSequences`; undefined behind a plan's.
        block_table: int32 [sequences, max_blocks]: blocks of each sequence.
        queries, results: [rows, heads, head_size], gathered query tokens and their partial results.
    """

    def __init__(
        self,
        settings: FlashSettings,
        tables: dict[str, torch.Tensor],
        partials: torch.Tensor,
    ) -> None:
        """`tables`: those that `table_shapes` names; `partials`: fp32 [slots, heads, head_size], of which the last are
        taken, as many as there are rows.

        Raises:
            ValueError: numbers of other than 16 bits, a head size that FlashAttention does not take, or too few slots.
        """
        slots, heads, head_size = partials.shape
        capacity = settings.capacity
        if settings.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {settings.dtype}")
        if head_size % HEAD_MULTIPLE:
            raise ValueError(f"head_size: expected a multiple of {HEAD_MULTIPLE}, got {head_size}")
        if slots < capacity.rows:
            raise ValueError(f"partials: expected at least {capacity.rows} slots, got {slots}")
        self.settings = settings
        self.bounds = SequenceBounds(0, 0, 0)
        self.query_start_loc = tables["query_start_loc"][0]
        self.seq_lens = tables["seq_lens"][0]
        self.sources = tables["sources"]
        self.tokens = tables["tokens"][0]
        self.row_of_slot = tables["row_of_slot"][0]
        device = partials.device
        shape = max(capacity.sequences, 1), settings.max_blocks
        self.block_table = torch.zeros(shape, dtype=torch.int32, device=device)
        self._own_slots = slots - capacity.rows
        # two arrays of 16 bits a number have the bytes of one of 32
        halves = partials[self._own_slots :].view(settings.dtype).view(2, capacity.rows, heads, head_size)
        self.queries, self.results = halves
        self._metadata = torch.zeros(4 * (capacity.sequences + 4) + 1, dtype=torch.int32, device=device)
        self._metadata_length = 0
        self._cache_like = torch.empty(
            (0, settings.shape.block_size, settings.kv_heads, head_size), dtype=settings.dtype, device=device
        )

    @property
    def metadata(self) -> torch.Tensor:
        """The metadata of FlashAttention's scheduler: it keeps its address, and its length for equal bounds."""
        return self._metadata[: self._metadata_length]

    @property
    def max_seq_len(self) -> int:
        """KV tokens of a sequence, at most."""
        return self.settings.max_blocks * self.settings.shape.block_size

    def tables_of(self, plan: WorkPlan, rows: int | None) -> dict[str, Int32s]:
        """The tables of a plan, padded to the bounds of launches for `rows` query tokens, or without padding.

        Raises:
            ValueError: when the plan exceeds the bounds.
        """
        exact, capacity = SequenceBounds.of_plan(plan), self.settings.capacity
        bounds = exact if rows is None else SequenceBounds.of_steps(rows, self.settings.shape).at_most(capacity)
        if not capacity.holds(exact) or plan.own_partials > self._own_slots:
            expected, got = f"{capacity} and {self._own_slots} own partials", f"{exact} and {plan.own_partials}"
            raise ValueError(f"plan: expected at most {expected}, got {got}")
        if not bounds.holds(exact):
            raise ValueError(f"plan: expected at most {bounds} of {rows} rows, got {exact}")
        self.bounds = bounds
        sequences = shared_sequences(plan)
        idle = bounds.sequences - exact.sequences
        return {
            "query_start_loc": np.pad(sequences.query_start_loc, (0, idle), mode="edge"),
            "seq_lens": np.pad(sequences.seq_lens, (0, idle)),
            "sources": sequences.sources,
            "tokens": sequences.tokens,
            "row_of_slot": sequences.row_of_slot if exact.sequences else sequences.row_of_slot[:0],
        }

    def prepare(self, block_table: torch.Tensor | None) -> None:
        """Queues what comes once a step, behind the upload: the blocks of sequences, and the scheduler's metadata."""
        if not self.bounds.sequences:
            return
        if block_table is not None:
            from batchllm_kernels.attention.flash_launch import copy_blocks

            copy_blocks(block_table, self)
        made = self.settings.attention.scheduler_metadata(
            self.queries[: self.bounds.rows],
            self._cache_like,
            self.query_start_loc[: self.bounds.sequences + 1],
            self.seq_lens[: self.bounds.sequences],
            max_query_len=self.bounds.longest_query,
            max_seq_len=self.max_seq_len,
            causal=False,
            splits=1,
        )
        self._metadata_length = len(made)
        self._metadata[: len(made)].copy_(made)

    def attend(self, key_cache: torch.Tensor, value_cache: torch.Tensor, scale: float) -> torch.Tensor:
        """Writes `results` of the gathered queries; returns their fp32 logarithms of sums [heads, rows], natural."""
        bounds = self.bounds
        _, lses = self.settings.attention.attend(
            self.queries[: bounds.rows],
            key_cache,
            value_cache,
            self.block_table[: bounds.sequences],
            self.query_start_loc[: bounds.sequences + 1],
            self.seq_lens[: bounds.sequences],
            max_query_len=bounds.longest_query,
            max_seq_len=self.max_seq_len,
            scale=scale,
            causal=False,
            splits=1,
            metadata=self.metadata,
            output=self.results[: bounds.rows],
        )
        return lses


def table_shapes(capacity: SequenceBounds, slots: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of the tables of `FlashShared`, by name."""
    return {
        "query_start_loc": (1, capacity.sequences + 1),
        "seq_lens": (1, max(capacity.sequences, 1)),
        "sources": (capacity.sequences, 2),
        "tokens": (1, max(capacity.rows, 1)),
        "row_of_slot": (1, max(slots, 1)),
    }
