"""Decode rows whose shared parts FlashAttention 3 runs: a stand-in in PyTorch here, and our kernels interpreted.

`test_flash_decode_rows` runs these tests in a process of their own, since vLLM imports Triton, which must know before
that it is to interpret.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from batchllm_kernels.vllm_plugin.attention_backend import SharedAttentionImpl
from batchllm_kernels.vllm_plugin.block_table_mirror import HostTable, note
from tests.attention.varlen_reference import ReferenceVarlenAttention
from tests.vllm_plugin.test_decode_rows import (
    BLOCK,
    DECODES,
    KV_HEADS,
    MIXED,
    PROMPT_BLOCKS,
    Builder,
    ReluctantBuilder,
    StockImpl,
    builder,
    expected,
    layer_inputs,
    step,
)


@pytest.fixture(autouse=True)
def attention(monkeypatch: pytest.MonkeyPatch) -> ReferenceVarlenAttention:
    """What builders take for FlashAttention 3."""
    made = ReferenceVarlenAttention()
    for kind in (Builder, ReluctantBuilder):
        monkeypatch.setattr(kind, "shared_attention", staticmethod(lambda _dtype, _head_size: made))
    return made


class Impl(SharedAttentionImpl, StockImpl):
    implementation = "triton"


def error(metadata: Any, common: CommonAttentionMetadata) -> float:
    """Largest deviation from the reference; NaN where a token has no answer, or padding has one."""
    query, cache = (numbers.half() for numbers in layer_inputs(common))
    key = torch.zeros((len(query), KV_HEADS, query.shape[2]), dtype=torch.half)
    output = torch.full_like(query, torch.nan)
    got = Impl().forward(None, query, key, key, cache, metadata, output)
    wanted = expected(common)
    if not torch.equal(got.isnan(), wanted.isnan()):
        return float("nan")
    return float((got.float() - wanted)[~wanted.isnan()].abs().max())


def test_a_mixed_step_has_launches_of_its_own(attention: ReferenceVarlenAttention) -> None:
    common = step(*MIXED)
    metadata = builder(dtype=torch.half).build(0, common)
    assert metadata.decode_rows.plan.plan.shared_tokens == PROMPT_BLOCKS * BLOCK
    assert metadata.decode_rows.shared_impl == "flash_attention_3"
    assert error(metadata, common) < 5e-3
    assert len(attention.addresses) == 1


@pytest.mark.parametrize("kind", [Builder, ReluctantBuilder])
def test_a_captured_step_is_replayed_with_every_plan(attention: ReferenceVarlenAttention, kind: type[Builder]) -> None:
    made = builder(kind, dtype=torch.half)
    table, lengths = torch.zeros((8, 16), dtype=torch.int32), torch.ones(8, dtype=torch.int32)
    dummy = step([1] * 8, [1] * 8)
    dummy.block_table_tensor, dummy.seq_lens = table, lengths
    captured = made.build_for_cudagraph_capture(dummy)
    others = step(*MIXED)
    for query_lens, seq_lens in (DECODES, ([1], [33]), ([1] * 8, [70, 66, 81, 100, 7, 2, 65, 129])):
        made.build(0, others)  # a step between the replays that is none
        common = step(query_lens, seq_lens, 8 - len(query_lens))
        table.copy_(common.block_table_tensor)
        note(table, HostTable(table.numpy()))
        lengths.copy_(common.seq_lens)
        common.block_table_tensor, common.seq_lens = table, lengths
        made.build(0, common)
        assert error(captured, common) < 5e-3
    assert len(set(attention.addresses)) == 1
