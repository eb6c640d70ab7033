"""Steps of a paged engine for the tests: who shares which blocks, and random numbers in the cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from batchllm_kernels.attention.api import plan_shape, prefix_shared_attention
from batchllm_kernels.attention.plan_buffers import PlanBuffers
from batchllm_kernels.attention.reference import paged_attention, planned_attention
from batchllm_kernels.attention.work_plan import WorkPlan, WorkPlanShape, plan_work


@dataclass
class Request:
    """A request of a step: `shares` names prefixes, each a (name, blocks) pair, that stand before its own tokens.

    Without any token it is a padding row.
    """

    own_tokens: int
    query_tokens: int = 1
    shares: tuple[tuple[str, int], ...] = ()


@dataclass
class Step:
    """Block table, lengths and query starts of a batch; block ids are shuffled, prefixes of one name are one run.

    Only steps of requests with one query token each have a plan.
    """

    requests: list[Request]
    block_size: int = 16
    seed: int = 0
    block_table: np.ndarray = field(init=False)
    seq_lens: np.ndarray = field(init=False)
    query_start_loc: np.ndarray = field(init=False)
    blocks: int = field(init=False)

    def __post_init__(self) -> None:
        rows: list[list[int]] = []
        named: dict[tuple[str, ...], list[int]] = {}
        self.blocks = 1  # block 0 is nobody's, as in vLLM
        lengths = []
        for request in self.requests:
            row: list[int] = []
            path: tuple[str, ...] = ()
            for name, count in request.shares:
                path = (*path, name)
                if path not in named:
                    named[path] = self._new(count)
                row += named[path]
            lengths.append(len(row) * self.block_size + request.own_tokens)
            row += self._new(-(-request.own_tokens // self.block_size))
            rows.append(row)
        width = max(map(len, rows), default=0) + 1
        shuffled = np.append(0, np.random.default_rng(self.seed).permutation(np.arange(1, self.blocks)))
        self.block_table = np.zeros((len(rows), width), dtype=np.int32)
        for at, row in enumerate(rows):
            self.block_table[at, : len(row)] = shuffled[row]
        self.seq_lens = np.array(lengths, dtype=np.int32)
        self.query_start_loc = np.cumsum([0] + [r.query_tokens for r in self.requests], dtype=np.int32)

    def _new(self, count: int) -> list[int]:
        self.blocks += count
        return list(range(self.blocks - count, self.blocks))

    @property
    def query_tokens(self) -> int:
        return int(self.query_start_loc[-1])

    def plan(self, shape: WorkPlanShape, *, share: bool = True) -> WorkPlan:
        assert all(request.query_tokens == 1 for request in self.requests)
        return plan_work(self.block_table, self.seq_lens, shape, share=share)


@dataclass
class Tensors:
    """A step with numbers: query, caches as vLLM's views, lengths; what no request may read is NaN."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return (
            self.query, self.key_cache, self.value_cache, self.block_table, self.seq_lens, self.query_start_loc,
        )  # fmt: skip

    @property
    def rows(self) -> tuple[torch.Tensor, ...]:
        """Of decode rows: query, caches, block table."""
        return self.query, self.key_cache, self.value_cache, self.block_table

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)

    def expected(self) -> torch.Tensor:
        return paged_attention(*self.inputs, self.scale)

    def shape(self, **changes: int) -> WorkPlanShape:
        return plan_shape(
            block_size=self.key_cache.shape[1],
            heads=self.query.shape[1],
            kv_heads=self.key_cache.shape[2],
            head_size=self.query.shape[2],
            dtype=self.query.dtype,
            device=self.query.device,
            **changes,
        )

    def planned(self, plan: WorkPlan) -> torch.Tensor:
        """The result of the reference, item by item."""
        return planned_attention(*self.rows, self.scale, plan)

    def attend(self, plan: WorkPlan, impl: str) -> torch.Tensor:
        """The result, of poisoned scratch space and output."""
        _, heads, head_size = self.query.shape
        buffers = PlanBuffers.of_plan(plan, heads, head_size, self.query.device)
        buffers.partials.fill_(torch.nan)
        buffers.lses.fill_(torch.nan)
        output = torch.full_like(self.query, torch.nan)
        prefix_shared_attention(*self.rows, scale=self.scale, plan=buffers, impl=impl, output=output)
        return output.float()


def tensors(
    step: Step,
    *,
    heads: int = 4,
    kv_heads: int = 1,
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensors:
    """Random numbers for a step, the same for the same seed."""
    generator = torch.Generator().manual_seed(step.seed)
    cache = torch.full((step.blocks, kv_heads, step.block_size, 2 * head_size), torch.nan)
    for row, length in zip(step.block_table, step.seq_lens, strict=True):
        for at in range(-(-int(length) // step.block_size)):
            filled = min(step.block_size, int(length) - at * step.block_size)
            numbers = torch.randn((kv_heads, filled, 2 * head_size), generator=generator)
            cache[row[at], :, :filled] = numbers
    keys, values = cache.to(dtype).to(device).transpose(1, 2).split(head_size, dim=-1)
    query = torch.randn((step.query_tokens, heads, head_size), generator=generator)
    return Tensors(
        query.to(dtype).to(device),
        keys,
        values,
        *(torch.from_numpy(a).to(device) for a in (step.block_table, step.seq_lens, step.query_start_loc)),
    )


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest deviation over the largest number expected; NaN for a NaN anywhere but in padding rows, which must have
    nothing else."""
    padding = expected.isnan()
    if not result[padding].isnan().all():
        return float("nan")
    numbers = expected[~padding]
    return float((result[~padding] - numbers).abs().max() / numbers.abs().max())


def mixed_requests() -> list[Request]:
    """Decode rows: two groups under one parent, a group beside them, lone requests, padding."""
    parent, document, other = ("parent", 3), ("document", 5), ("other", 4)
    return [
        Request(own_tokens=5, shares=(parent, document)),
        Request(own_tokens=1, shares=(("elsewhere", 6),)),
        Request(own_tokens=33, shares=(parent, other)),
        Request(own_tokens=16, shares=(parent, document)),
        Request(own_tokens=0),
        Request(own_tokens=70),
        Request(own_tokens=20, shares=(parent, other)),
        Request(own_tokens=17, shares=(("elsewhere", 6),)),
        Request(own_tokens=9, shares=(parent, document)),
        Request(own_tokens=1),
        Request(own_tokens=30, shares=(parent, document)),
        Request(own_tokens=2, shares=(parent, other)),
        Request(own_tokens=0),
    ]


def prompt_requests() -> list[Request]:
    """Requests that compute their prompts, with and without context, beside some that decode."""
    return [
        Request(own_tokens=5, shares=(("prefix", 3),)),
        Request(own_tokens=20, query_tokens=20, shares=(("prefix", 3),)),
        Request(own_tokens=40, query_tokens=40),
        Request(own_tokens=9, query_tokens=3, shares=(("prefix", 3),)),
        Request(own_tokens=1, query_tokens=0),
        Request(own_tokens=1),
        Request(own_tokens=30, query_tokens=7),
    ]
