"""Once per engine step: finds what is shared, asks the cost gate, and brings the plan to the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from batchllm_kernels.attention.api import plan_shape
from batchllm_kernels.attention.cost import Calibration, Decision, ModelHeads, decide, planned_cost, stock_cost
from batchllm_kernels.attention.plan_buffers import Allocate, PlanBuffers, PlanCapacity
from batchllm_kernels.attention.prefix_sharing import Int32s
from batchllm_kernels.attention.work_plan import PlanShape, plan_work

LONGEST_PAUSE = 16  # steps between two looks at batches that do not pay


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Largest step of an engine: query tokens, and requests."""

    max_tokens: int
    max_requests: int


class StepPlanner:
    """Decides step by step whether the attention of all layers shares prefixes, and with which plan.

    A look costs the host some time. Steps of a batch that does not pay are therefore looked at less and less often, up
    to every sixteenth; one that pays, every time.

    Args:
        model: heads of this rank.
        block_size: tokens of a KV block.
        dtype: of query and cache.
        limits: of the engine.
        calibration: of the device.
        device: of the engine.
        allocate: makes the scratch space of all layers, new if None.

    Raises:
        ValueError: heads or a head size that the kernels do not support.
    """

    def __init__(
        self,
        model: ModelHeads,
        block_size: int,
        dtype: torch.dtype,
        limits: StepLimits,
        calibration: Calibration,
        device: torch.device,
        allocate: Allocate | None = None,
    ) -> None:
        self._model = model
        self._calibration = calibration
        self._shape = _shape(model, block_size, dtype, device)
        capacity = PlanCapacity.of_steps(limits.max_requests, self._shape)
        self._buffers = PlanBuffers(capacity, model.heads, model.head_size, device, allocate=allocate)
        self._pause = 0
        self._skip = 0
        self.decision: Decision | None = None

    def plan(
        self, block_table: Int32s, seq_lens: torch.Tensor, query_start_loc: torch.Tensor, max_seq_len: int
    ) -> PlanBuffers | None:
        """The plan of a step, on the device, or None where the stock path is to run.

        `decision` says why; it is None for a step that was not looked at: one with prompts in it, too.

        Args:
            block_table: int32 [requests, blocks of the longest request or more].
            seq_lens: int32 [requests], with the tokens of this step, on the host.
            query_start_loc: int32 [requests + 1], on the host.
            max_seq_len: of `seq_lens`, or more.
        """
        self.decision = None
        if self._skip:
            self._skip -= 1
            return None
        if bool((query_start_loc.diff() != 1).any()):
            return None
        columns = -(-max_seq_len // self._shape.block_size)
        table = block_table[:, :columns]
        lengths = seq_lens.numpy(), query_start_loc.numpy()
        plan = plan_work(table, lengths[0], self._shape)
        self.decision = decide(
            plan,
            planned_cost(plan, *lengths, self._model),
            stock_cost(*lengths, self._shape, self._model),
            self._calibration,
        )
        if not self._buffers.capacity.holds(plan):
            self.decision = Decision(
                False, "the plan exceeds its buffers", self.decision.stock_seconds, self.decision.shared_seconds
            )
        if not self.decision.share:
            self._pause = min(LONGEST_PAUSE - 1, 2 * self._pause + 1)
            self._skip = self._pause
            return None
        self._pause = 0
        self._buffers.load(plan)
        return self._buffers

    def load_alone(self, seq_lens: torch.Tensor) -> PlanBuffers:
        """A plan on the device in which every row reads its own context, whatever it shares.

        Args:
            seq_lens: int32 [rows], with the token of this step, on the host.
        """
        lengths = seq_lens.numpy()
        columns = -(-int(lengths.max(initial=0)) // self._shape.block_size)
        table = np.broadcast_to(np.int32(0), (len(lengths), columns))  # which blocks it reads, the plan does not say
        self._buffers.load(plan_work(table, lengths, self._shape, share=False))
        return self._buffers


def step_capacity(
    model: ModelHeads, block_size: int, dtype: torch.dtype, limits: StepLimits, device: torch.device
) -> PlanCapacity:
    """Room for every plan of an engine; arguments as of `StepPlanner`."""
    return PlanCapacity.of_steps(limits.max_requests, _shape(model, block_size, dtype, device))


def _shape(model: ModelHeads, block_size: int, dtype: torch.dtype, device: torch.device) -> PlanShape:
    return plan_shape(
        block_size=block_size,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_size=model.head_size,
        dtype=dtype,
        device=device,
    )
