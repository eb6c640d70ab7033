"""The three kernels of prefix-shared attention: shared parts, own parts, and the merge of own parts that are split.

Maths, layouts and the reasons for the shapes are in the README of this folder; `reference.planned_attention` is the
naive version of all three. Logarithms are of base two here, since the device computes `exp2`. Every program strides
over the counts that lie on the device, so that any grid is right and a captured CUDA graph may run any plan.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-incomplete-defs=False
# ruff: noqa: N803 - compile-time constants of a Triton kernel are written in capitals
# ruff: noqa: PLR0915 - a kernel is one function: what it calls is compiled into it, with every argument named again

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # read when the kernels below are made, as Triton does


@triton.jit(do_not_specialize=["block_table_stride"])
def attend_shared_kernel(
    query,  # [tokens, heads, HEAD_SIZE]
    key_cache,  # [blocks, BLOCK_SIZE, kv_heads, HEAD_SIZE], any strides but 1 along HEAD_SIZE
    value_cache,  # as key_cache
    block_table,  # int32 [requests, max_blocks]
    items,  # int32 [capacity, 6], columns work_plan.SharedItem
    rows,  # int32 [capacity, 2]: query token, partial slot of the first split
    counts,  # int32 [4]: shared items, own items, merges, gathered rows
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
    HEADS_PER_KV: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,  # next power of two
    BLOCK_SIZE: tl.constexpr,
    LOW_ROWS: tl.constexpr,
    HIGH_ROWS: tl.constexpr,
    KV_TILE: tl.constexpr,
    LOW_STAGES: tl.constexpr,
    HIGH_STAGES: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,  # the interpreter multiplies the bits of bfloat16 numbers
):
    """Shared items, each for one KV head: partial results of the queries of all members over one run of blocks.

    Items of few rows take a lower tile: more of them run at once, and they are bound by memory.
    """
    for work in range(tl.program_id(0), tl.load(counts) * kv_heads, tl.num_programs(0)):
        # the heads of an item are neighbours, so that long items of all heads start first
        kv_head = work % kv_heads
        fields = items + work // kv_heads * 6
        row_start = tl.load(fields)
        row_count = tl.load(fields + 1)
        request = tl.load(fields + 2).to(tl.int64)
        kv_start = tl.load(fields + 3)
        kv_end = tl.load(fields + 4)
        split = tl.load(fields + 5)
        keys = key_cache + kv_head * key_head_stride.to(tl.int64)
        values = value_cache + kv_head * value_head_stride.to(tl.int64)
        table = block_table + request * block_table_stride
        item_rows = rows + row_start * 2
        if (LOW_ROWS < HIGH_ROWS) & (row_count * HEADS_PER_KV > LOW_ROWS):
            _attend_shared_tile(
                query, keys, values, table, item_rows, partials, lses, scale_log2, heads, kv_head, row_count, kv_start,
                kv_end, split, query_token_stride, query_head_stride, key_block_stride, key_slot_stride,
                value_block_stride, value_slot_stride, HEADS_PER_KV, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, HIGH_ROWS,
                KV_TILE, HIGH_STAGES, DOT_PRECISION, DOT_IN_FP32,
            )  # fmt: skip
        else:
            _attend_shared_tile(
                query, keys, values, table, item_rows, partials, lses, scale_log2, heads, kv_head, row_count, kv_start,
                kv_end, split, query_token_stride, query_head_stride, key_block_stride, key_slot_stride,
                value_block_stride, value_slot_stride, HEADS_PER_KV, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, LOW_ROWS,
                KV_TILE, LOW_STAGES, DOT_PRECISION, DOT_IN_FP32,
            )  # fmt: skip


@triton.jit
def _attend_shared_tile(
    query,
    key_cache,  # of the KV head
    value_cache,
    block_table,  # row of a member
    rows,  # of the item
    partials,
    lses,
    scale_log2,
    heads,
    kv_head,
    row_count,
    kv_start,
    kv_end,
    split,
    query_token_stride,
    query_head_stride,
    key_block_stride,
    key_slot_stride,
    value_block_stride,
    value_slot_stride,
    HEADS_PER_KV: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KV_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_PADDED)
    in_head = dim < HEAD_SIZE
    # the heads of one KV head stand beside each other in the rows of a tile
    token_row = row // HEADS_PER_KV
    in_tile = token_row < row_count
    token = tl.load(rows + token_row * 2, mask=in_tile, other=0).to(tl.int64)
    slot = tl.load(rows + token_row * 2 + 1, mask=in_tile, other=0)
    head = kv_head * HEADS_PER_KV + row % HEADS_PER_KV
    in_both = in_tile[:, None] & in_head[None, :]
    q = tl.load(  # [ROWS, HEAD_PADDED]
        query + (token * query_token_stride + head * query_head_stride)[:, None] + dim[None, :], mask=in_both, other=0.0
    )
    if DOT_IN_FP32:
        q = q.to(tl.float32)
    highest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    accumulated = tl.zeros([ROWS, HEAD_PADDED], dtype=tl.float32)
    position = tl.arange(0, KV_TILE)
    # whole tiles need no mask of positions; what is left is one more round
    whole_end = kv_start + (kv_end - kv_start) // KV_TILE * KV_TILE
    for start in tl.range(kv_start, whole_end, KV_TILE, num_stages=STAGES):
        block = tl.load(block_table + (start + position) // BLOCK_SIZE).to(tl.int64)
        in_block = (start + position) % BLOCK_SIZE
        keys = tl.load(  # [HEAD_PADDED, KV_TILE]
            key_cache + (block * key_block_stride + in_block * key_slot_stride)[None, :] + dim[:, None],
            mask=in_head[:, None],
            other=0.0,
        )
        values = tl.load(  # [KV_TILE, HEAD_PADDED]
            value_cache + (block * value_block_stride + in_block * value_slot_stride)[:, None] + dim[None, :],
            mask=in_head[None, :],
            other=0.0,
        )
        if DOT_IN_FP32:
            keys = keys.to(tl.float32)
        scores = tl.dot(q, keys, input_precision=DOT_PRECISION)
        accumulated, total, highest = _take_in(
            scores, values, accumulated, total, highest, scale_log2, DOT_PRECISION, DOT_IN_FP32
        )
    for start in range(whole_end, kv_end, KV_TILE):
        seen = start + position < kv_end
        block = tl.load(block_table + (start + position) // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        in_block = (start + position) % BLOCK_SIZE
        keys = tl.load(
            key_cache + (block * key_block_stride + in_block * key_slot_stride)[None, :] + dim[:, None],
            mask=in_head[:, None] & seen[None, :],
            other=0.0,
        )
        values = tl.load(
            value_cache + (block * value_block_stride + in_block * value_slot_stride)[:, None] + dim[None, :],
            mask=in_head[None, :] & seen[:, None],
            other=0.0,
        )
        if DOT_IN_FP32:
            keys = keys.to(tl.float32)
        scores = tl.dot(q, keys, input_precision=DOT_PRECISION)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        accumulated, total, highest = _take_in(
            scores, values, accumulated, total, highest, scale_log2, DOT_PRECISION, DOT_IN_FP32
        )
    partial_row = (slot + split).to(tl.int64) * heads + head
    tl.store(partials + partial_row[:, None] * HEAD_SIZE + dim[None, :], accumulated / total[:, None], mask=in_both)
    tl.store(lses + partial_row, highest + tl.log2(total), mask=in_tile)


@triton.jit
def _take_in(
    scores,  # fp32 [ROWS, KV_TILE], without the scale; minus infinity for keys that are not seen
    values,  # [KV_TILE, HEAD_PADDED]
    accumulated,
    total,
    highest,
    scale_log2,
    DOT_PRECISION: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
):
    """One tile of keys into the running softmax: sum of weighted values, sum of weights, highest scaled score."""
    higher = tl.maximum(highest, tl.max(scores, axis=1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - higher[:, None])
    rescale = tl.exp2(highest - higher)
    total = total * rescale + tl.sum(weights, axis=1)
    weights = weights.to(values.dtype)
    if DOT_IN_FP32:
        weights = weights.to(tl.float32)
        values = values.to(tl.float32)
    accumulated = tl.dot(weights, values, accumulated * rescale[:, None], input_precision=DOT_PRECISION)
    return accumulated, total, higher


@triton.jit(do_not_specialize=["part_lse_head_step", "block_table_stride"])
def attend_own_kernel(
    query,  # [tokens, heads, HEAD_SIZE]
    key_cache,  # [blocks, BLOCK_SIZE, kv_heads, HEAD_SIZE], any strides but 1 along HEAD_SIZE
    value_cache,  # as key_cache
    block_table,  # int32 [requests, max_blocks]
    items,  # int32 [capacity, 6], columns work_plan.OwnItem
    counts,  # int32 [4]: shared items, own items, merges, gathered rows
    output,  # [tokens, heads, HEAD_SIZE]
    partials,  # fp32 [slots, heads, HEAD_SIZE]
    lses,  # fp32 [slots, heads], base two
    parts,  # [rows, heads, HEAD_SIZE]: shared parts where PARTS_IN_ROWS, else not read, as are the next two
    part_lses,  # fp32, natural logarithms: rows side by side, heads `part_lse_head_step` apart
    row_of_slot,  # int32 [slots]
    scale_log2,  # softmax scale x log2(e)
    heads,
    kv_heads,
    part_lse_head_step,  # of a tensor that may have other rows in each call
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
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # at least HEADS_PER_KV, and what a matrix unit multiplies
    KV_TILE: tl.constexpr,  # divides BLOCK_SIZE, so that a tile lies in one block
    STAGES: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
    PARTS_IN_ROWS: tl.constexpr,  # shared parts are FlashAttention's, elsewhere than those of the shared kernel
):
    """Own items, each for one KV head: the softmax of a token starts from its shared parts and goes on over its own.

    A tile of keys lies in one block, whose number is one scalar: addresses cost few instructions, and one warp an item
    is enough to ask for memory as fast as it answers.
    """
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_PADDED)
    in_tile = row < HEADS_PER_KV
    in_head = dim < HEAD_SIZE
    in_both = in_tile[:, None] & in_head[None, :]
    position = tl.arange(0, KV_TILE)
    for work in range(tl.program_id(0), tl.load(counts + 1) * kv_heads, tl.num_programs(0)):
        kv_head = work % kv_heads
        fields = items + work // kv_heads * 6
        token = tl.load(fields).to(tl.int64)
        kv_start = tl.load(fields + 1)
        kv_end = tl.load(fields + 2)
        first_slot = tl.load(fields + 3)
        end_slot = tl.load(fields + 4)
        out_slot = tl.load(fields + 5)
        head = kv_head * HEADS_PER_KV + row
        q = tl.load(  # [ROWS, HEAD_PADDED]
            query + (token * query_token_stride + head * query_head_stride)[:, None] + dim[None, :],
            mask=in_both,
            other=0.0,
        )
        if DOT_IN_FP32:
            q = q.to(tl.float32)
        highest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        accumulated = tl.zeros([ROWS, HEAD_PADDED], dtype=tl.float32)
        partial_row = first_slot.to(tl.int64) * heads + head
        for taken_slot in range(first_slot, end_slot):
            if PARTS_IN_ROWS:
                part_row = tl.load(row_of_slot + taken_slot).to(tl.int64)
                natural_lse = tl.load(part_lses + head * part_lse_head_step + part_row, mask=in_tile, other=0.0)
                lse = natural_lse * 1.4426950408889634
                of_head = (part_row * heads + head) * HEAD_SIZE
                part = tl.load(parts + of_head[:, None] + dim[None, :], mask=in_both, other=0.0).to(tl.float32)
            else:
                lse = tl.load(lses + partial_row, mask=in_tile, other=0.0)
                part = tl.load(partials + partial_row[:, None] * HEAD_SIZE + dim[None, :], mask=in_both, other=0.0)
            higher = tl.maximum(highest, lse)
            weight = tl.exp2(lse - higher)
            rescale = tl.exp2(highest - higher)
            accumulated = accumulated * rescale[:, None] + part * weight[:, None]
            total = total * rescale + weight
            highest = higher
            partial_row += heads
        keys_of_head = key_cache + kv_head * key_head_stride.to(tl.int64)
        values_of_head = value_cache + kv_head * value_head_stride.to(tl.int64)
        table = block_table + token * block_table_stride
        whole_end = kv_start + (kv_end - kv_start) // KV_TILE * KV_TILE
        for start in tl.range(kv_start, whole_end, KV_TILE, num_stages=STAGES):
            block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
            in_block = start % BLOCK_SIZE + position
            keys = tl.load(  # [HEAD_PADDED, KV_TILE]
                keys_of_head + block * key_block_stride + (in_block * key_slot_stride)[None, :] + dim[:, None],
                mask=in_head[:, None],
                other=0.0,
            )
            values = tl.load(  # [KV_TILE, HEAD_PADDED]
                values_of_head + block * value_block_stride + (in_block * value_slot_stride)[:, None] + dim[None, :],
                mask=in_head[None, :],
                other=0.0,
            )
            if DOT_IN_FP32:
                keys = keys.to(tl.float32)
            scores = tl.dot(q, keys, input_precision=DOT_PRECISION)  # [ROWS, KV_TILE]
            accumulated, total, highest = _take_in(
                scores, values, accumulated, total, highest, scale_log2, DOT_PRECISION, DOT_IN_FP32
            )
        for start in range(whole_end, kv_end, KV_TILE):
            seen = start + position < kv_end
            block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
            in_block = start % BLOCK_SIZE + position
            keys = tl.load(
                keys_of_head + block * key_block_stride + (in_block * key_slot_stride)[None, :] + dim[:, None],
                mask=in_head[:, None] & seen[None, :],
                other=0.0,
            )
            values = tl.load(
                values_of_head + block * value_block_stride + (in_block * value_slot_stride)[:, None] + dim[None, :],
                mask=in_head[None, :] & seen[:, None],
                other=0.0,
            )
            if DOT_IN_FP32:
                keys = keys.to(tl.float32)
            scores = tl.dot(q, keys, input_precision=DOT_PRECISION)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            accumulated, total, highest = _take_in(
                scores, values, accumulated, total, highest, scale_log2, DOT_PRECISION, DOT_IN_FP32
            )
        result = accumulated / total[:, None]
        if out_slot < 0:
            tl.store(
                output + (token * output_token_stride + head * output_head_stride)[:, None] + dim[None, :],
                result.to(output.dtype.element_ty),
                mask=in_both,
            )
        else:
            partial_row = out_slot.to(tl.int64) * heads + head
            tl.store(partials + partial_row[:, None] * HEAD_SIZE + dim[None, :], result, mask=in_both)
            tl.store(lses + partial_row, highest + tl.log2(total), mask=in_tile)


@triton.jit
def merge_splits_kernel(
    partials,  # fp32 [slots, heads, HEAD_SIZE]
    lses,  # fp32 [slots, heads], base two
    merges,  # int32 [capacity, 3], columns work_plan.Merge
    counts,  # int32 [4]: shared items, own items, merges, gathered rows
    output,  # [tokens, heads, HEAD_SIZE]
    heads,
    output_token_stride,
    output_head_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    HEAD_TILE: tl.constexpr,
):
    """The output of one query token for some heads, from its partial results in the order of their keys."""
    head_tiles = tl.cdiv(heads, HEAD_TILE)
    dim = tl.arange(0, HEAD_PADDED)
    for work in range(tl.program_id(0), tl.load(counts + 2) * head_tiles, tl.num_programs(0)):
        fields = merges + work // head_tiles * 3
        token = tl.load(fields).to(tl.int64)
        first = tl.load(fields + 1)
        end = tl.load(fields + 2)
        head = work % head_tiles * HEAD_TILE + tl.arange(0, HEAD_TILE)
        in_heads = head < heads
        in_tile = in_heads[:, None] & (dim < HEAD_SIZE)[None, :]
        highest = tl.full([HEAD_TILE], float("-inf"), dtype=tl.float32)
        total = tl.zeros([HEAD_TILE], dtype=tl.float32)
        accumulated = tl.zeros([HEAD_TILE, HEAD_PADDED], dtype=tl.float32)
        row = first.to(tl.int64) * heads + head
        for _ in range(first, end):
            lse = tl.load(lses + row, mask=in_heads, other=0.0)
            part = tl.load(partials + row[:, None] * HEAD_SIZE + dim[None, :], mask=in_tile, other=0.0)
            higher = tl.maximum(highest, lse)
            rescale = tl.exp2(highest - higher)
            weight = tl.exp2(lse - higher)
            accumulated = accumulated * rescale[:, None] + part * weight[:, None]
            total = total * rescale + weight
            highest = higher
            row += heads
        tl.store(
            output + (token * output_token_stride + head * output_head_stride)[:, None] + dim[None, :],
            (accumulated / total[:, None]).to(output.dtype.element_ty),
            mask=in_tile,
        )
