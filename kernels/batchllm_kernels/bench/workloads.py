"""Decode steps of the project's workload shapes: who shares which blocks, and how long everyone is.

Each is one step in the middle of a job fed in planned order: as many requests as run at once, members of a group
together, half of the output generated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from batchllm_kernels.arrays import Int32s

RUNNING_REQUESTS = 256
SEED = 0


@dataclass(frozen=True, slots=True)
class SharingRequest:
    """A decoding request: the prefixes it has, from the start on, as (name, tokens), and its own tokens."""

    prefixes: tuple[tuple[str, int], ...]
    own_tokens: int


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A named step of decoding requests.

    Attributes:
        name: of the workload.
        block_size: tokens of a block; a shared part is whole blocks, what is left of a prefix belongs to the request.
        block_table: int32 [R, max_blocks].
        seq_lens: int32 [R].
        query_start_loc: int32 [R + 1]; one query token each.
        unique_kv_tokens: KV tokens when every shared block is counted once: no plan can read less.
        blocks: number of blocks in use, block 0 being nobody's.
    """

    name: str
    block_size: int
    block_table: Int32s
    seq_lens: Int32s
    query_start_loc: Int32s
    unique_kv_tokens: int
    blocks: int


def decode_step(name: str, requests: list[SharingRequest], block_size: int) -> DecodeStep:
    """The block table of a step, shared prefixes being shared in whole blocks."""
    table: list[list[int]] = []
    shared: dict[tuple[str, ...], list[int]] = {}
    lengths, next_block, unique = [], 1, 0
    for request in requests:
        row: list[int] = []
        path: tuple[str, ...] = ()
        tokens = 0
        for prefix, prefix_tokens in request.prefixes:
            path = (*path, prefix)
            tokens += prefix_tokens
            count = tokens // block_size - len(row)
            if path not in shared:
                shared[path] = list(range(next_block, next_block + count))
                next_block += count
                unique += count * block_size
            row += shared[path]
        length = tokens + request.own_tokens
        unique += length - len(row) * block_size
        own = -(-length // block_size) - len(row)
        row += range(next_block, next_block + own)
        next_block += own
        table.append(row)
        lengths.append(length)
    block_table = np.zeros((len(table), max(map(len, table))), dtype=np.int32)
    for at, row in enumerate(table):
        block_table[at, : len(row)] = row
    starts = np.arange(len(table) + 1, dtype=np.int32)
    return DecodeStep(name, block_size, block_table, np.array(lengths, dtype=np.int32), starts, unique, next_block)


def groups(count: int, *, prefix: int, own: int, degree: int) -> list[SharingRequest]:
    """Prefix groups of one shape."""
    return [SharingRequest(((f"group {g}", prefix),), own) for g in range(count) for _ in range(degree)]


def workload_steps(block_size: int) -> Iterator[DecodeStep]:
    """One step of every workload shape."""
    random = np.random.default_rng(SEED)
    half_output = 50
    named = {
        "one group of the paper's shape (2000 + 200, degree 16)": groups(1, prefix=2000, own=200, degree=16),
        "paper micro (2000 + 200, degree 16)": groups(16, prefix=2000, own=200 + half_output, degree=16),
        "long prefix (16000 + 200, degree 16)": groups(4, prefix=16000, own=200 + half_output, degree=16),
        "prefix repetition (256 + 256, one prefix)": groups(1, prefix=256, own=320, degree=RUNNING_REQUESTS),
        "prefix repetition (256 + 256, degree 49)": groups(5, prefix=256, own=320, degree=49),
        "generated shared prefix (2048 + 128, degree 16)": groups(16, prefix=2048, own=256, degree=16),
        "document questions (500 to 4000, degree 4 to 12)": _documents(random),
        "few-shot (2000 for all)": [
            SharingRequest((("examples", 2000),), int(own)) for own in random.integers(50, 330, RUNNING_REQUESTS)
        ],
        "two-level tree (200, 800, 40; degree 6)": [
            SharingRequest((("template", 200), (f"document {n // 6}", 800)), 60) for n in range(RUNNING_REQUESTS)
        ],
        "Zipf groups": _zipf(random),
        "ragged output, no sharing": [
            SharingRequest((), int(own)) for own in 100 + random.integers(50, 300, RUNNING_REQUESTS)
        ],
        "no sharing": groups(RUNNING_REQUESTS, prefix=2000, own=200, degree=1),
    }
    for name, requests in named.items():
        yield decode_step(name, requests, block_size)


def _documents(random: np.random.Generator) -> list[SharingRequest]:
    made: list[SharingRequest] = []
    while len(made) < RUNNING_REQUESTS:
        document, tokens = f"document {len(made)}", int(random.integers(500, 4000))
        own = random.integers(25, 120, int(random.integers(4, 13)))
        made += [SharingRequest((("template", 100), (document, tokens)), int(n)) for n in own]
    return made


def _zipf(random: np.random.Generator) -> list[SharingRequest]:
    made: list[SharingRequest] = []
    while len(made) < RUNNING_REQUESTS:
        prefix = int(np.clip(random.lognormal(np.log(600), 0.6), 32, 4000))
        degree = int(min(random.zipf(1.1), 64))
        made += [SharingRequest(((f"group {len(made)}", prefix),), int(n)) for n in random.integers(50, 400, degree)]
    return made
