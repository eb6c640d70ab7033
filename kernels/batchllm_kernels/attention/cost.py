"""Whether sharing pays for a step: traffic and arithmetic of both paths, on a device as it was measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np

from batchllm_kernels.attention.prefix_sharing import Int32s
from batchllm_kernels.attention.work_plan import PlanShape, WorkPlan

TABLE = "calibration.json"
PARTIAL_BYTES = 4  # partial results and their log-sum-exp are fp32


@dataclass(frozen=True, slots=True)
class ModelHeads:
    """Attention heads of one rank: query heads, KV heads, numbers of a head, bytes of a number."""

    heads: int
    kv_heads: int
    head_size: int
    element_bytes: int = 2

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of the keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_size * self.element_bytes

    @property
    def query_token_bytes(self) -> int:
        """Bytes of one token's query, or of its output."""
        return self.heads * self.head_size * self.element_bytes


@dataclass(frozen=True, slots=True)
class StepCost:
    """Traffic and arithmetic of the attention of one layer in one step.

    Attributes:
        kv_bytes: keys and values read.
        partial_bytes: partial results read back by the merge; as many are written before.
        query_bytes: queries read, once for each item.
        output_bytes: results written.
        flops: operations of both products.
    """

    kv_bytes: int
    partial_bytes: int
    query_bytes: int
    output_bytes: int
    flops: int

    @property
    def bytes_read(self) -> int:
        """Everything read, in bytes."""
        return self.kv_bytes + self.partial_bytes + self.query_bytes

    @property
    def bytes_moved(self) -> int:
        """Everything read or written, in bytes."""
        return self.bytes_read + self.partial_bytes + self.output_bytes


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a device reaches in these kernels and in the stock ones.

    Attributes:
        source: the device measured, or why these numbers are assumed.
        stock_bytes_per_second, shared_bytes_per_second: traffic of a memory-bound step.
        stock_flops_per_second, shared_flops_per_second: arithmetic of a compute-bound step.
        shared_overhead_seconds: what a layer of the shared path costs beyond that: a second launch.
        minimum_gain: share of the stock time that must be saved before a step leaves the stock path.
    """

    source: str
    stock_bytes_per_second: float
    shared_bytes_per_second: float
    stock_flops_per_second: float
    shared_flops_per_second: float
    shared_overhead_seconds: float
    minimum_gain: float


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a step shares, why, and the seconds a layer is expected to take on both paths."""

    share: bool
    reason: str
    stock_seconds: float
    shared_seconds: float


def planned_cost(plan: WorkPlan, seq_lens: Int32s, query_start_loc: Int32s, heads: ModelHeads) -> StepCost:
    """Cost of a step on the shared path; arrays as in `plan_work`."""
    rows_read = plan.shared_queries_read + len(plan.own_items)
    return StepCost(
        kv_bytes=plan.kv_tokens_read * heads.kv_token_bytes,
        partial_bytes=plan.partials * heads.heads * (heads.head_size + 1) * PARTIAL_BYTES,
        query_bytes=rows_read * heads.query_token_bytes,
        output_bytes=plan.query_tokens * heads.query_token_bytes,
        flops=_flops(seq_lens, query_start_loc, heads),
    )


def stock_cost(seq_lens: Int32s, query_start_loc: Int32s, shape: PlanShape, heads: ModelHeads) -> StepCost:
    """Cost of a step where every request reads its own context, once for each tile of its query tokens."""
    query = np.diff(query_start_loc).astype(np.int64)
    context = seq_lens.astype(np.int64) - query
    tiles = -(-query // shape.shared_tile_tokens)
    # tiles before the last are full and end at their own last token
    kv_tokens = tiles * context + shape.shared_tile_tokens * tiles * (tiles - 1) // 2 + query
    tokens = int(query.sum())
    return StepCost(
        kv_bytes=int(kv_tokens.sum()) * heads.kv_token_bytes,
        partial_bytes=0,
        query_bytes=tokens * heads.query_token_bytes,
        output_bytes=tokens * heads.query_token_bytes,
        flops=_flops(seq_lens, query_start_loc, heads),
    )


def decide(plan: WorkPlan, shared: StepCost, stock: StepCost, calibration: Calibration) -> Decision:
    """Whether the step is expected to be faster with sharing by at least the calibrated minimum gain."""
    stock_seconds = max(
        stock.bytes_moved / calibration.stock_bytes_per_second, stock.flops / calibration.stock_flops_per_second
    )
    shared_seconds = calibration.shared_overhead_seconds + max(
        shared.bytes_moved / calibration.shared_bytes_per_second, shared.flops / calibration.shared_flops_per_second
    )
    if not plan.shared_tokens:
        return Decision(False, "nothing worth sharing", stock_seconds, shared_seconds)
    gain = 1 - shared_seconds / stock_seconds
    share = gain >= calibration.minimum_gain
    reason = f"expected gain {gain:.1%} of {stock_seconds * 1e6:.0f} us, needed {calibration.minimum_gain:.1%}"
    return Decision(share, reason, stock_seconds, shared_seconds)


def calibration_for(device_name: str) -> Calibration:
    """The measured entry of a device, else the assumed one, which says so in its source.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
    """
    table = _table()
    return table.get(device_name, table["assumed"])


def _flops(seq_lens: Int32s, query_start_loc: Int32s, heads: ModelHeads) -> int:
    query = np.diff(query_start_loc).astype(np.int64)
    keys_seen = query * (seq_lens - query) + query * (query + 1) // 2
    return 4 * heads.heads * heads.head_size * int(keys_seen.sum())


@cache
def _table() -> dict[str, Calibration]:
    text = resources.files(__package__).joinpath(TABLE).read_text(encoding="utf-8")
    return {name: Calibration(**entry) for name, entry in json.loads(text)["devices"].items()}
