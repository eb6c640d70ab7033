"""Once per engine step: finds what its decode rows share, asks the cost gate, and brings the plan to the device."""

from __future__ import annotations

import numpy as np
import torch

from batchllm_kernels.arrays import Int32s
from batchllm_kernels.attention.api import plan_shape, prefix_shared_attention
from batchllm_kernels.attention.cost import Decision, KernelCalibration, Launching, ModelHeads, StepSetting, decide
from batchllm_kernels.attention.flash_shared import (
    FlashSettings,
    SequenceBounds,
    SharedImplementation,
    VarlenAttention,
)
from batchllm_kernels.attention.plan_buffers import UPLOAD_DEPTH, Allocate, PlanBuffers, PlanCapacity
from batchllm_kernels.attention.step_traffic import step_work
from batchllm_kernels.attention.work_plan import WorkPlanShape, plan_work

LONGEST_PAUSE = 8
"""Steps from one look at batches that do not pay to the next. A look at 1,024 rows takes the host 0.2 ms longer than a
plan without sharing where nothing is shared, 0.9 ms where it is and does not pay: below a hundredth of any step at this
pace, and a job that begins to share is seen after 8 of its hundreds of steps."""

EXPOSED_PLAN_SECONDS = 1e-3
"""The host's time for a step that shares, with 1,024 rows on a busy core, where the device waits for the host."""


class StepPlanner:
    """Decides step by step whether the decode rows of all layers share prefixes, and with which plan.

    Steps of decode rows alone and steps that compute prompts beside are looked at each at their own pace: what pays in
    one kind may not in the other. One that pays is looked at every time, those that do not less and less often, up to
    every eighth.

    Args:
        model: heads of this rank.
        layers: that run a step's plan.
        block_size: tokens of a KV block.
        dtype: of query and cache.
        max_requests: most decode rows of a step.
        calibration: of the device.
        device: of the engine.
        host_hidden: whether the host plans while the device works on the step before, as with asynchronous scheduling.
        allocate: makes the scratch space of all layers, new if None.
        upload_depth: steps that the engine has under way.
        shared_attention: FlashAttention 3 for the shared parts, None for the Triton kernel.
        max_blocks: blocks of the longest request; asked for with FlashAttention only.

    Attributes:
        shared_impl: what runs the shared parts.

    Raises:
        ValueError: heads or a head size that the kernels do not support.
    """

    def __init__(
        self,
        model: ModelHeads,
        layers: int,
        block_size: int,
        dtype: torch.dtype,
        max_requests: int,
        calibration: KernelCalibration,
        device: torch.device,
        *,
        host_hidden: bool = True,
        allocate: Allocate | None = None,
        upload_depth: int = UPLOAD_DEPTH,
        shared_attention: VarlenAttention | None = None,
        max_blocks: int = 0,
    ) -> None:
        self._model = model
        self._layers = layers
        self._dtype = dtype
        self._calibration = calibration
        self._exposed_seconds = 0.0 if host_hidden else EXPOSED_PLAN_SECONDS
        self.shared_impl: SharedImplementation = "triton" if shared_attention is None else "flash_attention_3"
        self._shape = _shape(model, block_size, dtype, device, self.shared_impl)
        flash = None
        if shared_attention is not None:
            bounds = SequenceBounds.of_steps(max_requests, self._shape)
            flash = FlashSettings(shared_attention, self._shape, model.kv_heads, dtype, max_blocks, bounds)
        capacity = PlanCapacity.of_steps(max_requests, self._shape)
        self._buffers = PlanBuffers(
            capacity, model.heads, model.head_size, device, upload_depth=upload_depth, allocate=allocate, flash=flash
        )
        self._paces = {False: _Pace(), True: _Pace()}
        self.decision: Decision | None = None

    def plan(
        self,
        block_table: Int32s,
        seq_lens: Int32s,
        *,
        launching: Launching,
        prefill_rows: bool,
        device_table: torch.Tensor | None = None,
        rows: int | None = None,
    ) -> PlanBuffers | None:
        """The plan of a step that shares, on the device, or None where it does not.

        `decision` says why; it is None for a step that was not looked at.

        Args:
            block_table: int32 [D, blocks of the longest row or more], of the decode rows.
            seq_lens: int32 [D], with the token of this step.
            launching: how the attention of this step comes to the device.
            prefill_rows: whether the step has other rows too.
            device_table: the block table on the device, of these rows or more; FlashAttention needs it.
            rows: that the graph has which replays the plan, None where none does; as in `PlanBuffers.load`.
        """
        self.decision = None
        pace = self._paces[prefill_rows]
        if not pace.due():
            return None
        plan = plan_work(self._columns_in_use(block_table, seq_lens), seq_lens, self._shape)
        work = step_work(plan, seq_lens, self._model, self._calibration)
        setting = StepSetting(self._layers, launching, prefill_rows, self._exposed_seconds)
        self.decision = decide(work, setting, self._calibration)
        pace.looked(paid=self.decision.share)
        if not self.decision.share:
            return None
        self._buffers.load(plan, device_table, rows=rows)
        return self._buffers

    def load_alone(self, seq_lens: Int32s, *, rows: int | None = None) -> PlanBuffers:
        """A plan on the device in which every row reads its own context.

        Args:
            seq_lens: int32 [D], with the token of this step.
            rows: as in `plan`.
        """
        blocks = -(-int(seq_lens.max(initial=0)) // self._shape.block_size)
        table = np.broadcast_to(np.int32(0), (len(seq_lens), blocks))  # not read where nothing is to be shared
        self._buffers.load(plan_work(table, seq_lens, self._shape, share=False), rows=rows)
        return self._buffers

    def compile_kernels(self) -> None:
        """Runs every kernel once, on a step of two rows with a shared run, so that no step that counts compiles any.

        Whoever captures a graph, or begins a job, finds the code of the model's heads, dtype and blocks there.
        """
        shape, model, device = self._shape, self._model, self._buffers.counts.device
        shared_blocks = int(2 * shape.partial_cost_tokens) // shape.block_size + 2  # just worth sharing
        table = np.arange(1, shared_blocks + 1, dtype=np.int32) * np.ones((2, 1), dtype=np.int32)
        table = np.concatenate([table, [[shared_blocks + 1], [shared_blocks + 2]]], axis=1, dtype=np.int32)
        lengths = np.full(2, shared_blocks * shape.block_size + 1, dtype=np.int32)
        plan = plan_work(table, lengths, shape)
        cache = torch.zeros(
            (shared_blocks + 3, model.kv_heads, shape.block_size, 2 * model.head_size), dtype=self._dtype, device=device
        )
        query = torch.zeros((2, model.heads, model.head_size), dtype=self._dtype, device=device)
        device_table = torch.from_numpy(table).to(device)
        self._buffers.load(plan, device_table, rows=len(table))
        keys, values = cache.transpose(1, 2).split(model.head_size, dim=-1)
        prefix_shared_attention(
            query,
            keys,
            values,
            device_table,
            scale=1.0,
            plan=self._buffers,
            impl="triton",
            shared_impl=self.shared_impl,
            every_launch=True,
        )

    def _columns_in_use(self, block_table: Int32s, seq_lens: Int32s) -> Int32s:
        return block_table[:, : -(-int(seq_lens.max(initial=0)) // self._shape.block_size)]


def step_capacity(
    model: ModelHeads,
    block_size: int,
    dtype: torch.dtype,
    max_requests: int,
    device: torch.device,
    *,
    shared_impl: SharedImplementation = "triton",
) -> PlanCapacity:
    """Room for every plan of an engine; arguments as of `StepPlanner`."""
    return PlanCapacity.of_steps(max_requests, _shape(model, block_size, dtype, device, shared_impl))


def _shape(
    model: ModelHeads, block_size: int, dtype: torch.dtype, device: torch.device, shared_impl: SharedImplementation
) -> WorkPlanShape:
    return plan_shape(
        block_size=block_size,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_size=model.head_size,
        dtype=dtype,
        device=device,
        shared_impl=shared_impl,
    )


class _Pace:
    """How often steps of one kind are looked at."""

    def __init__(self) -> None:
        self._pause = 0
        self._skip = 0

    def due(self) -> bool:
        """Whether this step is to be looked at; call it once a step."""
        if self._skip:
            self._skip -= 1
            return False
        return True

    def looked(self, *, paid: bool) -> None:
        """What the look has found."""
        self._pause = 0 if paid else min(LONGEST_PAUSE - 1, 2 * self._pause + 1)
        self._skip = self._pause
