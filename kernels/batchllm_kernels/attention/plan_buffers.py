"""A work plan on the device: buffers of fixed capacity and address, with the counts beside them, and scratch space.

A captured CUDA graph keeps reading the same addresses, and learns from the counts how much of them is filled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from batchllm_kernels.arrays import Int32s
from batchllm_kernels.attention.flash_shared import FlashSettings, FlashShared, table_shapes
from batchllm_kernels.attention.pinned_uploads import PinnedUploads
from batchllm_kernels.attention.prefix_sharing import MAX_LEVELS
from batchllm_kernels.attention.work_plan import Merge, OwnItem, SharedItem, WorkPlan, WorkPlanShape

COUNTS = 4  # shared items, own items, merges, and query tokens gathered for FlashAttention
ALIGNMENT = 32  # int32s of 128 bytes: where a part of the buffer may start
UPLOAD_DEPTH = 2  # host buffers for uploads: steps that an engine has under way, as vLLM's async scheduling has

Allocate = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Makes fp32 scratch space on the device of its maker, of (name, shape)."""


@dataclass(frozen=True, slots=True)
class PlanCapacity:
    """Room for the plans of a model runner.

    Attributes:
        shared_items: tiles of rows x splits of KV tokens.
        shared_rows: query tokens of all nodes.
        own_items: rows, and further splits of their own ranges.
        merges: rows whose own range is split.
        partials: slots of partial results.
    """

    shared_items: int
    shared_rows: int
    own_items: int
    merges: int
    partials: int

    @staticmethod
    def of_steps(max_requests: int, shape: WorkPlanShape) -> PlanCapacity:
        """Room for every plan of so many rows and this shape: none of them can exceed it.

        A level of the trie names a row at most once, and a node has two rows or more: at most half as many nodes as
        rows, and beyond one tile for each node as many as rows fill. A range is split only if it is longer than the
        share of one of the programs that the shape aims at, and has at most one further split for each whole share in
        it: ranges that are split, and the further splits of all of them, are no more than programs. A tile has at most
        `shared_tile_tokens` rows, each of which has a partial result for each split.
        """
        programs, own_programs, tile = shape.target_items, shape.own_target_items, shape.shared_tile_tokens
        merges = min(max_requests, own_programs)
        return PlanCapacity(
            shared_items=MAX_LEVELS * (max_requests // 2 + max_requests // tile) + programs,
            shared_rows=MAX_LEVELS * max_requests,
            own_items=max_requests + own_programs,
            merges=merges,
            partials=MAX_LEVELS * max_requests + min(tile, max_requests) * programs + merges + own_programs,
        )

    @staticmethod
    def of_plan(plan: WorkPlan) -> PlanCapacity:
        """Room for one plan."""
        return PlanCapacity(
            len(plan.shared_items), len(plan.shared_rows), len(plan.own_items), len(plan.merges), plan.partials
        )

    def scratch(self, heads: int, head_size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what `PlanBuffers` has in fp32: partial results, and their logs of sums."""
        return {"partials": (self.partials, heads, head_size), "lses": (self.partials, heads)}

    def holds(self, plan: WorkPlan) -> bool:
        """Whether a plan fits."""
        needed = PlanCapacity.of_plan(plan)
        return all(getattr(needed, name) <= getattr(self, name) for name in self.__dataclass_fields__)


class PlanBuffers:
    """The device side of a plan, shared by all layers of a step.

    Attributes:
        capacity: room of the buffers.
        counts: int32 [4] on the device: shared items, own items, merges, and query tokens gathered for FlashAttention.
        own_items, merges, shared_items, shared_rows: int32, as in `WorkPlan`, on the device; rows behind the counts
            are undefined. These and the counts are views of one buffer, each at a multiple of 128 bytes.
        partials: fp32 [slots, heads, head_size]; lses: fp32 [slots, heads]. Written and read within one layer.
        flash: FlashAttention 3 for the shared parts, None where the Triton kernel runs them. Its queries and results
            then take the place of the slots of shared parts.
        plan: the plan last loaded, None before the first.
        prepared: what `api` prepared of launches over these buffers, by the layout of the tensors.
        last_prepared: the layout of the layer before, and what was prepared for it.
    """

    def __init__(
        self,
        capacity: PlanCapacity,
        heads: int,
        head_size: int,
        device: torch.device,
        *,
        upload_depth: int = UPLOAD_DEPTH,
        allocate: Allocate | None = None,
        flash: FlashSettings | None = None,
    ) -> None:
        """`heads`: query heads of this rank; `upload_depth`: steps that the engine has under way; `allocate`: makes the
        scratch space, new if None; `flash`: runs the shared parts, None for the Triton kernel.
        """
        self.capacity = capacity
        # what is of shared parts alone stands last: a step that shares nothing does not upload it
        shapes = {"counts": (1, COUNTS)}
        late = {}
        if flash is not None:
            late = table_shapes(flash.capacity, capacity.partials)
            shapes |= {name: late.pop(name) for name in ("query_start_loc", "seq_lens")}
        shapes |= {
            "own_items": (capacity.own_items, len(OwnItem)),
            "merges": (capacity.merges, len(Merge)),
            "shared_items": (capacity.shared_items, len(SharedItem)),
            "shared_rows": (capacity.shared_rows, 2),
        }
        self._layout = _Layout(shapes | late)
        self._buffer = torch.zeros(self._layout.size, dtype=torch.int32, device=device)
        tables = self._layout.views(self._buffer)
        self.counts: torch.Tensor = tables["counts"][0]
        self.own_items, self.merges = tables["own_items"], tables["merges"]
        self.shared_items, self.shared_rows = tables["shared_items"], tables["shared_rows"]
        allocate = allocate or (lambda _name, shape: torch.empty(shape, dtype=torch.float32, device=device))
        scratch = {name: allocate(name, shape) for name, shape in capacity.scratch(heads, head_size).items()}
        self.partials, self.lses = scratch["partials"], scratch["lses"]
        self.flash: FlashShared | None = None
        if flash is not None:
            self.flash = FlashShared(flash, tables, self.partials)
        self.plan: WorkPlan | None = None
        self.prepared: dict[Any, Any] = {}
        self.last_prepared: tuple[Any, Any] = (None, None)
        self._uploads = PinnedUploads(self._buffer, upload_depth)

    @staticmethod
    def of_plan(
        plan: WorkPlan,
        heads: int,
        head_size: int,
        device: torch.device,
        *,
        flash: FlashSettings | None = None,
        block_table: torch.Tensor | None = None,
    ) -> PlanBuffers:
        """Buffers that hold just one plan, with it; arguments as of the class and of `load`."""
        buffers = PlanBuffers(PlanCapacity.of_plan(plan), heads, head_size, device, flash=flash)
        buffers.load(plan, block_table)
        return buffers

    def load(self, plan: WorkPlan, block_table: torch.Tensor | None = None, *, rows: int | None = None) -> None:
        """Copies a plan to the device in one piece, without waiting for it.

        Args:
            plan: of `plan_work`.
            block_table: int32 [requests, max_blocks] on the device, from which the plan was made; FlashAttention needs
                it where the plan shares.
            rows: query tokens that launches are made for, padding included: of the CUDA graph that is captured for this
                plan or replayed with it. None where every launch is made for its own plan. FlashAttention needs it.

        Raises:
            ValueError: when the plan does not fit; `PlanCapacity.holds` tells beforehand. Without a block table where
                one is needed.
        """
        if not self.capacity.holds(plan):
            raise ValueError(f"plan: expected at most {self.capacity}, got {PlanCapacity.of_plan(plan)}")
        gathered = 0
        tables = {}
        if self.flash is not None:
            if block_table is None and len(plan.nodes):
                raise ValueError("block_table: expected that of the step for FlashAttention, got None")
            tables = self.flash.tables_of(plan, rows)
            gathered = len(tables["tokens"])
        tables |= {
            "counts": np.array([len(plan.shared_items), len(plan.own_items), len(plan.merges), gathered], np.int32),
            "own_items": plan.own_items,
            "merges": plan.merges,
            "shared_items": plan.shared_items,
            "shared_rows": plan.shared_rows,
        }
        self._uploads.load(self._layout.parts(tables))
        self.plan = plan
        if self.flash is not None:
            self.flash.prepare(block_table)

    def read_back(self) -> WorkPlan:
        """The plan as it lies on the device now, by its counts: what a kernel finds. Waits for the device.

        Raises:
            ValueError: when none was loaded.
        """
        if self.plan is None:
            raise ValueError("plan: expected buffers with a plan loaded, got empty ones")
        shared, own, merges, _ = self.counts.tolist()
        shared_items = self.shared_items[:shared].cpu().numpy()
        rows = (shared_items[:, SharedItem.ROW_START] + shared_items[:, SharedItem.ROW_COUNT]).max(initial=0)
        return replace(
            self.plan,
            shared_items=shared_items,
            shared_rows=self.shared_rows[:rows].cpu().numpy(),
            own_items=self.own_items[:own].cpu().numpy(),
            merges=self.merges[:merges].cpu().numpy(),
            partials=self.capacity.partials,
        )


class _Layout:
    """Where tables of so many rows and columns stand in one int32 buffer, by name and in this order."""

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        # an empty tensor has no address
        self.shapes = {name: (max(rows, 1), columns) for name, (rows, columns) in shapes.items()}
        self.starts: dict[str, int] = {}
        self.size = 0
        for name, (rows, columns) in self.shapes.items():
            self.starts[name] = self.size
            self.size += -(-rows * columns // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tables in a buffer, at their full capacity."""
        return {
            name: buffer[self.starts[name] : self.starts[name] + rows * columns].view(rows, columns)
            for name, (rows, columns) in self.shapes.items()
        }

    def parts(self, tables: dict[str, Int32s]) -> list[tuple[int, Int32s]]:
        """Tables that are not empty, with where they start."""
        return [(self.starts[name], table) for name, table in tables.items() if table.size]
