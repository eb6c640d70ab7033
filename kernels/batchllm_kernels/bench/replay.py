"""The product path in a CUDA graph: a decode step captured once, replayed with changed plans, right each time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from batchllm_kernels.attention.api import prefix_shared_attention
from batchllm_kernels.attention.flash_shared import DTYPES, SharedImplementation, VarlenAttention
from batchllm_kernels.attention.plan_buffers import PlanBuffers, PlanCapacity
from batchllm_kernels.attention.reference import paged_attention
from batchllm_kernels.attention.work_plan import plan_work
from batchllm_kernels.bench.grid import GridPoint
from batchllm_kernels.bench.layered_step import LayeredStep, layered_step
from batchllm_kernels.bench.measure import MAX_ERROR, WrongResultError
from batchllm_kernels.bench.ours import flash_settings, our_call, plan_of, shape_of
from batchllm_kernels.bench.setup import Setup
from batchllm_kernels.bench.workloads import DecodeStep

LAYERS = 4
CHECKED_ROWS = 8
PADDING_ROWS = 3


class CapturedStep:
    """A decode step of several layers at fixed addresses; plan, lengths and block table change between replays."""

    def __init__(self, setup: Setup, point: GridPoint, rows: int, attention: VarlenAttention | None = None) -> None:
        """`rows`: that the captured step is padded to; `point` gives caches and heads; `attention`: FlashAttention 3
        for the shared parts, None for the Triton kernel."""
        self.inputs: LayeredStep = layered_step(point, setup.device, setup.dtype, layers=setup.layers or LAYERS)
        flash = None if attention is None else flash_settings(self.inputs, attention, rows)
        self._shape = shape_of(point, setup.device, setup.dtype) if flash is None else flash.shape
        self._shared_impl: SharedImplementation = "triton" if flash is None else "flash_attention_3"
        self.buffers = PlanBuffers(
            PlanCapacity.of_steps(rows, self._shape), point.heads, point.head_size, setup.device, flash=flash
        )
        width = self.inputs.block_table.shape[1]
        self.block_table = torch.zeros((rows, width), dtype=torch.int32, device=setup.device)
        self.seq_lens = torch.zeros(rows, dtype=torch.int32, device=setup.device)
        self.query = torch.empty((rows, point.heads, point.head_size), dtype=setup.dtype, device=setup.device).normal_()
        self.outputs = [torch.empty_like(self.query) for _ in self.inputs.caches]
        self.load(self.inputs.step, share=True)
        self.replay = setup.capture(self._run)

    def load(self, step: DecodeStep, *, share: bool) -> None:
        """Brings a step to the addresses of the captured one; rows behind its requests are padding."""
        count = len(step.seq_lens)
        table, lengths = np.zeros(self.block_table.shape, np.int32), np.zeros(len(self.seq_lens), np.int32)
        table[:count, : step.block_table.shape[1]] = step.block_table
        lengths[:count] = step.seq_lens
        self.block_table.copy_(torch.from_numpy(table))
        self.seq_lens.copy_(torch.from_numpy(lengths))
        self.buffers.load(plan_work(table, lengths, self._shape, share=share), self.block_table, rows=len(table))

    def layer(self, number: int) -> torch.Tensor:
        """Attention of one layer."""
        return prefix_shared_attention(
            self.query,
            *self.inputs.caches[number],
            self.block_table,
            scale=self.inputs.scale,
            plan=self.buffers,
            impl="triton",
            shared_impl=self._shared_impl,
            output=self.outputs[number],
            every_launch=True,
        )

    def _run(self) -> None:
        for number in range(self.inputs.layers):
            self.layer(number)

    def error(self) -> float:
        """Largest relative error of some rows of all layers after a replay into poisoned memory."""
        for tensor in (*self.outputs, self.buffers.partials, self.buffers.lses):
            tensor.fill_(torch.nan)
        self.replay()
        real = int((self.seq_lens > 0).sum())
        some = torch.linspace(0, real - 1, min(CHECKED_ROWS, real)).long().to(self.query.device)
        starts = torch.arange(len(some) + 1, dtype=torch.int32)
        errors = []
        for caches, output in zip(self.inputs.caches, self.outputs, strict=True):
            expected = paged_attention(
                self.query[some], *caches, self.block_table[some], self.seq_lens[some], starts, self.inputs.scale
            )
            whole = torch.where(torch.isfinite(output[:real]).all(), 0.0, torch.nan)
            errors.append((output[some].float() - expected).abs().max() / expected.abs().max() + whole)
        return float(torch.stack(errors).max())


def replayed_plans(point: GridPoint) -> dict[str, tuple[DecodeStep, bool]]:
    """Steps of one cache to replay one after the other, and whether each shares."""
    step = point.step()
    few = max(1, len(step.seq_lens) // 3)

    def rows(chosen: slice) -> DecodeStep:
        return replace(
            step,
            block_table=step.block_table[chosen],
            seq_lens=step.seq_lens[chosen],
            query_start_loc=np.arange(len(step.seq_lens[chosen]) + 1, dtype=np.int32),
        )

    return {
        "as captured": (step, True),
        "nothing shared": (step, False),
        "fewer rows": (rows(slice(0, few)), True),
        "other rows": (rows(slice(few, None)), True),
        "one row": (rows(slice(0, 1)), True),
        "as captured, again": (step, True),
    }


def replay_row(setup: Setup, point: GridPoint) -> dict[str, Any]:
    """Errors of plans that are replayed one after the other, and what the captured launches cost.

    Also with FlashAttention 3 for the shared parts, where there is its library and numbers have 16 bits.

    Raises:
        WrongResultError: when an error is larger than `MAX_ERROR`.
    """
    step = point.step()
    rows = len(step.seq_lens) + PADDING_ROWS
    kinds: dict[str, VarlenAttention | None] = {"": None}
    if setup.dtype in DTYPES and not isinstance(setup.flash_attention_3, str):
        kinds[", FlashAttention 3 for shared parts"] = setup.flash_attention_3
    errors: dict[str, float] = {}
    times: dict[str, float] = {}
    for kind, attention in kinds.items():
        captured = CapturedStep(setup, point, rows, attention)
        errors |= {f"{name}{kind}": error for name, error in _replayed_errors(captured, point).items()}
        for name, share in (("sharing", True), ("idle sharing", False)):
            captured.load(step, share=share)
            timed = f"{name}{kind}"
            times[timed] = setup.timer({timed: captured.layer}, captured.inputs.layers)[timed]
    fitting = {
        f"{name}, launches with work only": our_call(
            captured.inputs, plan_of(captured.inputs, share=share), every_launch=False
        )
        for name, share in (("sharing", True), ("nothing shared", False))
    }
    return {"relative_errors": errors, "microseconds": times | setup.timer(fitting, captured.inputs.layers)}


def _replayed_errors(captured: CapturedStep, point: GridPoint) -> dict[str, float]:
    errors = {}
    for name, (changed, share) in replayed_plans(point).items():
        captured.load(changed, share=share)
        errors[name] = captured.error()
        if not errors[name] <= MAX_ERROR:
            raise WrongResultError(f"{name}: expected a relative error of at most {MAX_ERROR}, got {errors[name]:.3g}")
    return errors
