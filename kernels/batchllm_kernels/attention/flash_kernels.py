"""What FlashAttention needs done around it: the blocks of its sequences once a step, their queries in each layer."""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-incomplete-defs=False
# ruff: noqa: N803 - compile-time constants of a Triton kernel are written in capitals

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["block_table_stride", "copied_stride"])
def copy_blocks_kernel(
    block_table,  # int32 [requests, max_blocks]
    sources,  # int32 [sequences, 2]: request, its first block
    seq_lens,  # int32 [sequences], KV tokens; 0 for a sequence that is not there
    copied,  # int32 [sequences, max_blocks]
    block_table_stride,
    copied_stride,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The blocks of one sequence, out of the block table row of one that shares them."""
    sequence = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(tl.load(seq_lens + sequence), BLOCK_SIZE)
    if blocks > 0:
        request = tl.load(sources + sequence * 2).to(tl.int64)
        first = tl.load(sources + sequence * 2 + 1)
        source = block_table + request * block_table_stride + first
        target = copied + sequence * copied_stride
        for start in range(0, blocks, TILE):
            block = start + tl.arange(0, TILE)
            in_run = block < blocks
            tl.store(target + block, tl.load(source + block, mask=in_run, other=0), mask=in_run)


@triton.jit
def gather_queries_kernel(
    query,  # [tokens, heads, HEAD_SIZE]
    tokens,  # int32 [rows]
    counts,  # int32 [4], the last: rows
    gathered,  # [rows, heads, HEAD_SIZE]
    heads,
    query_token_stride,
    query_head_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    HEAD_TILE: tl.constexpr,
):
    """The query token of each row, some heads at a time."""
    head_tiles = tl.cdiv(heads, HEAD_TILE)
    dim = tl.arange(0, HEAD_PADDED)
    for work in range(tl.program_id(0), tl.load(counts + 3) * head_tiles, tl.num_programs(0)):
        row = (work // head_tiles).to(tl.int64)
        token = tl.load(tokens + row).to(tl.int64)
        head = work % head_tiles * HEAD_TILE + tl.arange(0, HEAD_TILE)
        in_tile = (head < heads)[:, None] & (dim < HEAD_SIZE)[None, :]
        of_token = tl.load(
            query + token * query_token_stride + (head * query_head_stride)[:, None] + dim[None, :], mask=in_tile
        )
        tl.store(gathered + ((row * heads + head) * HEAD_SIZE)[:, None] + dim[None, :], of_token, mask=in_tile)
