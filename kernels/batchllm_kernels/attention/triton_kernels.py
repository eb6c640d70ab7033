"""The two kernels of prefix-shared attention: one launch over all work items, one over the tokens to merge.

Maths, layouts and the reasons for the shapes are in the README of this folder; `reference.planned_attention` is the
naive version of both. Logarithms are of base two here, since the device computes `exp2`.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-incomplete-defs=False
# ruff: noqa: N803 - compile-time constants of a Triton kernel are written in capitals

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # read when the kernels below are made, as Triton does


@triton.jit
def attend_items_kernel(
    query,  # [tokens, heads, HEAD_SIZE]
    key_cache,  # [blocks, BLOCK_SIZE, kv_heads, HEAD_SIZE], any strides but 1 along HEAD_SIZE
    value_cache,  # as key_cache
    block_table,  # int32 [requests, max_blocks]
    seq_lens,  # int32 [requests]
    query_start_loc,  # int32 [requests + 1]
    items,  # int32 [item capacity, 8]: see work_plan.WorkPlan
    rows,  # int32 [row capacity, 2]: query token, first partial slot or -1
    counts,  # int32 [2]: items, merges
    output,  # [tokens, heads, HEAD_SIZE]
    partials,  # fp32 [slots, heads, HEAD_SIZE]
    lses,  # fp32 [slots, heads], base two
    scale_log2,  # softmax scale x log2(e)
    heads,
    kv_heads,
    query_token_stride,
    query_head_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
    block_table_stride,
    output_token_stride,
    output_head_stride,
    HEADS_PER_KV: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,  # next power of two
    BLOCK_SIZE: tl.constexpr,
    NARROW_ROWS: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    KV_TILE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,  # the interpreter multiplies the bits of bfloat16 numbers
):
    """One work item for one KV head; heads of an item are neighbours, so that long items of all heads start first."""
    item = tl.program_id(0) // kv_heads
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    if item >= tl.load(counts):
        return
    fields = items + item.to(tl.int64) * 8
    row_start = tl.load(fields)
    row_count = tl.load(fields + 1)
    request = tl.load(fields + 2).to(tl.int64)
    kv_start = tl.load(fields + 3)
    kv_end = tl.load(fields + 4)
    split = tl.load(fields + 5)
    causal = tl.load(fields + 6)
    wide = tl.load(fields + 7)
    # position of query token t of the request is t + first_position; rows of a shared item see all of its keys
    first_position = tl.load(seq_lens + request) - tl.load(query_start_loc + request + 1)
    first_position = tl.where(causal != 0, first_position, kv_end)
    key_cache += kv_head * key_head_stride
    value_cache += kv_head * value_head_stride
    block_table += request * block_table_stride
    rows += row_start.to(tl.int64) * 2
    if (WIDE_ROWS > NARROW_ROWS) & (wide != 0):
        _attend_tile(
            query, key_cache, value_cache, block_table, rows, output, partials, lses, scale_log2, heads, kv_head,
            row_count, kv_start, kv_end, split, first_position, query_token_stride, query_head_stride,
            key_block_stride, key_slot_stride, value_block_stride, value_slot_stride, output_token_stride,
            output_head_stride, HEADS_PER_KV, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, WIDE_ROWS, KV_TILE, DOT_PRECISION,
            DOT_IN_FP32,
        )  # fmt: skip
    else:
        _attend_tile(
            query, key_cache, value_cache, block_table, rows, output, partials, lses, scale_log2, heads, kv_head,
            row_count, kv_start, kv_end, split, first_position, query_token_stride, query_head_stride,
            key_block_stride, key_slot_stride, value_block_stride, value_slot_stride, output_token_stride,
            output_head_stride, HEADS_PER_KV, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, NARROW_ROWS, KV_TILE, DOT_PRECISION,
            DOT_IN_FP32,
        )  # fmt: skip


@triton.jit
def _attend_tile(
    query,
    key_cache,
    value_cache,
    block_table,
    rows,
    output,
    partials,
    lses,
    scale_log2,
    heads,
    kv_head,
    row_count,
    kv_start,
    kv_end,
    split,
    first_position,
    query_token_stride,
    query_head_stride,
    key_block_stride,
    key_slot_stride,
    value_block_stride,
    value_slot_stride,
    output_token_stride,
    output_head_stride,
    HEADS_PER_KV: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KV_TILE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_PADDED)
    in_head = dim < HEAD_SIZE
    # the heads of one KV head stand beside each other in the rows of a tile
    token_row = row // HEADS_PER_KV
    in_tile = token_row < row_count
    token = tl.load(rows + token_row * 2, mask=in_tile, other=0)
    slot = tl.load(rows + token_row * 2 + 1, mask=in_tile, other=-1)
    head = kv_head * HEADS_PER_KV + row % HEADS_PER_KV
    position = first_position + token

    q = tl.load(  # [ROWS, HEAD_PADDED]
        query + (token.to(tl.int64) * query_token_stride + head * query_head_stride)[:, None] + dim[None, :],
        mask=in_tile[:, None] & in_head[None, :],
        other=0.0,
    )
    if DOT_IN_FP32:
        q = q.to(tl.float32)
    highest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    accumulated = tl.zeros([ROWS, HEAD_PADDED], dtype=tl.float32)

    for start in range(kv_start, kv_end, KV_TILE):
        kv_position = start + tl.arange(0, KV_TILE)
        in_range = kv_position < kv_end
        block = tl.load(block_table + kv_position // BLOCK_SIZE, mask=in_range, other=0).to(tl.int64)
        in_block = kv_position % BLOCK_SIZE
        keys = tl.load(  # [HEAD_PADDED, KV_TILE]
            key_cache + (block * key_block_stride + in_block * key_slot_stride)[None, :] + dim[:, None],
            mask=in_head[:, None] & in_range[None, :],
            other=0.0,
        )
        values = tl.load(  # [KV_TILE, HEAD_PADDED]
            value_cache + (block * value_block_stride + in_block * value_slot_stride)[:, None] + dim[None, :],
            mask=in_range[:, None] & in_head[None, :],
            other=0.0,
        )
        if DOT_IN_FP32:
            keys = keys.to(tl.float32)
        scores = tl.dot(q, keys, input_precision=DOT_PRECISION) * scale_log2  # [ROWS, KV_TILE]
        seen = in_range[None, :] & (kv_position[None, :] <= position[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        # a row that has seen no key yet has a highest score of minus infinity
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(highest - base)
        total = total * rescale + tl.sum(weights, axis=1)
        weights = weights.to(values.dtype)
        if DOT_IN_FP32:
            weights = weights.to(tl.float32)
            values = values.to(tl.float32)
        accumulated = tl.dot(weights, values, accumulated * rescale[:, None], input_precision=DOT_PRECISION)
        highest = higher

    seen_any = total > 0.0
    divisor = tl.where(seen_any, total, 1.0)
    result = accumulated / divisor[:, None]
    direct = in_tile & (slot < 0)
    tl.store(
        output + (token.to(tl.int64) * output_token_stride + head * output_head_stride)[:, None] + dim[None, :],
        result.to(output.dtype.element_ty),
        mask=direct[:, None] & in_head[None, :],
    )
    partial = in_tile & (slot >= 0)
    partial_row = (slot + split).to(tl.int64) * heads + head
    tl.store(
        partials + partial_row[:, None] * HEAD_SIZE + dim[None, :],
        result,
        mask=partial[:, None] & in_head[None, :],
    )
    tl.store(lses + partial_row, tl.where(seen_any, highest + tl.log2(divisor), float("-inf")), mask=partial)


@triton.jit
def merge_partials_kernel(
    partials,  # fp32 [slots, heads, HEAD_SIZE]
    lses,  # fp32 [slots, heads], base two
    merges,  # int32 [merge capacity, 3]: query token, first slot, slot after the last
    counts,  # int32 [2]: items, merges
    output,  # [tokens, heads, HEAD_SIZE]
    heads,
    output_token_stride,
    output_head_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    HEAD_TILE: tl.constexpr,
):
    """The output of one query token for some heads, from its partial results in the order of their keys."""
    merge = tl.program_id(0)
    if merge >= tl.load(counts + 1):
        return
    fields = merges + merge.to(tl.int64) * 3
    token = tl.load(fields).to(tl.int64)
    first = tl.load(fields + 1)
    end = tl.load(fields + 2)
    head = tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE)
    dim = tl.arange(0, HEAD_PADDED)
    in_heads = head < heads
    in_tile = in_heads[:, None] & (dim < HEAD_SIZE)[None, :]
    highest = tl.full([HEAD_TILE], float("-inf"), dtype=tl.float32)
    total = tl.zeros([HEAD_TILE], dtype=tl.float32)
    accumulated = tl.zeros([HEAD_TILE, HEAD_PADDED], dtype=tl.float32)
    row = first.to(tl.int64) * heads + head
    for _ in range(first, end):
        lse = tl.load(lses + row, mask=in_heads, other=float("-inf"))
        part = tl.load(partials + row[:, None] * HEAD_SIZE + dim[None, :], mask=in_tile, other=0.0)
        higher = tl.maximum(highest, lse)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        rescale = tl.exp2(highest - base)
        weight = tl.exp2(lse - base)
        accumulated = accumulated * rescale[:, None] + part * weight[:, None]
        total = total * rescale + weight
        highest = higher
        row += heads
    result = accumulated / tl.where(total > 0.0, total, 1.0)[:, None]
    head = head.to(tl.int64)
    tl.store(
        output + (token * output_token_stride + head * output_head_stride)[:, None] + dim[None, :],
        result.to(output.dtype.element_ty),
        mask=in_tile,
    )
