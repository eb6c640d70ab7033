"""A work plan on the device: buffers of fixed capacity and address, with the counts beside them, and scratch space.

A captured CUDA graph keeps reading the same addresses, and learns from the counts how much of them is filled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from batchllm_kernels.attention.work_plan import ITEM_FIELDS, PlanShape, WorkPlan


@dataclass(frozen=True, slots=True)
class PlanCapacity:
    """Room for the plans of a model runner.

    Attributes:
        items: work items.
        rows: query tokens of all items, splits counted once.
        merges: query tokens with more than one partial result.
        partials: partial results.
    """

    items: int
    rows: int
    merges: int
    partials: int

    @staticmethod
    def of_steps(max_tokens: int, max_requests: int, shape: PlanShape, *, levels: int = 2) -> PlanCapacity:
        """Room for steps of so many query tokens and requests, where a token shares on at most `levels` levels.

        Every tile but the last of a segment is full, and splitting adds no more items than it aims at. Partial results
        are kept for as many tokens as there are requests, with two levels and two splits each: tokens of long prefill
        chunks fill tiles alone and are written at once. A step that needs more does not fit and is left to the caller.
        """
        tiles = -(-max_tokens // shape.narrow_tile_tokens) + 2 * max_requests
        partials = 2 * (levels + 1) * max_requests + 2 * shape.target_items * shape.wide_tile_tokens
        return PlanCapacity(
            items=(levels + 1) * tiles + shape.target_items,
            rows=(levels + 1) * max_tokens,
            merges=max_tokens,
            partials=partials,
        )

    @staticmethod
    def of_plan(plan: WorkPlan) -> PlanCapacity:
        """Room for one plan."""
        return PlanCapacity(len(plan.items), len(plan.rows), len(plan.merges), plan.partials)

    def holds(self, plan: WorkPlan) -> bool:
        """Whether a plan fits."""
        needed = PlanCapacity.of_plan(plan)
        return all(getattr(needed, name) <= getattr(self, name) for name in self.__dataclass_fields__)


class PlanBuffers:
    """The device side of a plan, shared by all layers of a step.

    Attributes:
        items, rows, merges: int32, as in `WorkPlan`, on the device.
        counts: int32 [2] on the device: items, merges.
        partials: fp32 [slots, heads, head_size]; lses: fp32 [slots, heads]. Written and read within one layer.
        grid: (items, merges) that a launch covers: the capacity with `fixed_grid`, else what the plan has.
        plan: the plan last loaded.
    """

    def __init__(
        self, capacity: PlanCapacity, heads: int, head_size: int, device: torch.device, *, fixed_grid: bool = False
    ) -> None:
        """`heads`: query heads of this rank; `fixed_grid`: launches may be captured in a CUDA graph."""
        self.capacity = capacity
        self.items = torch.zeros((max(capacity.items, 1), ITEM_FIELDS), dtype=torch.int32, device=device)
        self.rows = torch.zeros((max(capacity.rows, 1), 2), dtype=torch.int32, device=device)
        self.merges = torch.zeros((max(capacity.merges, 1), 3), dtype=torch.int32, device=device)
        self.counts = torch.zeros(2, dtype=torch.int32, device=device)
        self.partials = torch.empty((capacity.partials, heads, head_size), dtype=torch.float32, device=device)
        self.lses = torch.empty((capacity.partials, heads), dtype=torch.float32, device=device)
        self.grid = (0, 0)
        self.plan: WorkPlan | None = None
        self._fixed_grid = fixed_grid

    @staticmethod
    def of_plan(plan: WorkPlan, heads: int, head_size: int, device: torch.device) -> PlanBuffers:
        """Buffers that hold just one plan, with it."""
        buffers = PlanBuffers(PlanCapacity.of_plan(plan), heads, head_size, device)
        buffers.load(plan)
        return buffers

    def load(self, plan: WorkPlan) -> None:
        """Copies a plan to the device without waiting for it.

        Raises:
            ValueError: when the plan does not fit; `PlanCapacity.holds` tells beforehand.
        """
        if not self.capacity.holds(plan):
            raise ValueError(f"plan: expected at most {self.capacity}, got {PlanCapacity.of_plan(plan)}")
        counts = np.array([len(plan.items), len(plan.merges)], dtype=np.int32)
        for buffer, array in (
            (self.items, plan.items),
            (self.rows, plan.rows),
            (self.merges, plan.merges),
            (self.counts, counts),
        ):
            source = torch.from_numpy(array)
            if buffer.device.type == "cuda":
                source = source.pin_memory()  # the host allocator keeps it until the copy is done
            buffer[: len(array)].copy_(source, non_blocking=True)
        self.grid = (len(self.items), len(self.merges)) if self._fixed_grid else (len(plan.items), len(plan.merges))
        self.plan = plan
