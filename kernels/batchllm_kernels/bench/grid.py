"""Decode steps to measure, the important ones first, so that a run with little time has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from batchllm_kernels.attention.cost import ModelHeads
from batchllm_kernels.bench.workloads import DecodeStep, decode_step, groups

MAX_CACHE_BYTES = 40 * 10**9  # of all layers together
MAX_REQUESTS = 1024
SEED = 0


@dataclass(frozen=True, slots=True)
class GridPoint:
    """A decode step: prefix groups of one shape.

    Attributes:
        prefix, own: tokens that the members of a group share, and that each has alone.
        degree: members of a group; 1 for nothing shared.
        heads, kv_heads, head_size: of the model's layers on one rank.
        block_size: tokens of a KV block.
        requests: most requests that decode at once; fewer where their caches would not fit.
        shuffled: members of a group stand anywhere in the batch, so that stock attention finds less of a prefix in the
            second-level cache; else side by side, as our plan feeds them.
    """

    prefix: int
    degree: int
    own: int = 200
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    block_size: int = 16
    requests: int = MAX_REQUESTS
    shuffled: bool = False

    @property
    def key(self) -> str:
        """Its name in a file of results."""
        order = "shuffled" if self.shuffled else "grouped"
        return (
            f"{self.prefix}x{self.degree} own {self.own} heads {self.heads}/{self.kv_heads}x{self.head_size} "
            f"block {self.block_size} requests {self.requests} {order}"
        )

    @property
    def model(self) -> ModelHeads:
        """Its heads, in bf16."""
        return ModelHeads(self.heads, self.kv_heads, self.head_size)

    def step(self) -> DecodeStep:
        """As many groups as the requests and the memory allow, at least one; block ids as in a cache long in use."""
        group_bytes = (self.prefix + self.degree * self.own) * self.model.kv_token_bytes
        count = max(1, min(self.requests // self.degree, MAX_CACHE_BYTES // group_bytes))
        requests = groups(count, prefix=self.prefix, own=self.own, degree=self.degree)
        step = decode_step(f"{self.prefix} + {self.own}, degree {self.degree}", requests, self.block_size)
        random = np.random.default_rng(SEED)
        scattered = np.append(0, random.permutation(np.arange(1, step.blocks))).astype(np.int32)
        order = random.permutation(len(step.seq_lens)) if self.shuffled else np.arange(len(step.seq_lens))
        return replace(step, block_table=scattered[step.block_table[order]], seq_lens=step.seq_lens[order])


def important_points() -> Iterator[GridPoint]:
    """What decides whether the kernels are good enough."""
    for prefix, degree in ((2000, 16), (16000, 64), (4096, 64), (256, 16), (2000, 2), (2000, 64), (2000, 256)):
        yield GridPoint(prefix, degree)
    yield GridPoint(256, 1024)
    yield GridPoint(2000, 1)
    yield GridPoint(2000, 16, shuffled=True)
    yield GridPoint(4096, 64, shuffled=True)
    # small batches, where launches count and long contexts are split
    for prefix, degree, requests in ((2000, 16, 64), (2000, 16, 16), (16000, 64, 64), (2000, 1, 64), (2000, 1, 16)):
        yield GridPoint(prefix, degree, requests=requests)
    for heads in (40, 64):
        yield GridPoint(2000, 16, heads=heads)
        yield GridPoint(16000, 64, heads=heads)
    yield GridPoint(2000, 16, block_size=32)


def whole_grid() -> Iterator[GridPoint]:
    """The important points, then every prefix, degree, head count and order, each once."""
    seen: set[GridPoint] = set()
    rest = (
        GridPoint(prefix, degree, heads=heads, shuffled=shuffled)
        for heads, shuffled, prefix, degree in product(
            (32, 64, 40), (False, True), (256, 1024, 2000, 4096, 16000), (2, 4, 8, 16, 32, 64, 128, 256, 1024)
        )
    )
    other_lengths = (
        GridPoint(prefix, degree, own, block_size=block_size)
        for block_size, own, prefix, degree in product((16, 32), (32, 512), (256, 2000, 16000), (2, 16, 64, 256))
    )
    for points in (important_points(), rest, other_lengths):
        for point in points:
            if point not in seen:
                seen.add(point)
                yield point
