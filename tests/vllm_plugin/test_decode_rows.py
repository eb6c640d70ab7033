"""Which rows of a step ours runs, and which the stock backend: metadata of both, and the answers of a layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker import workspace
from vllm.v1.worker.gpu_worker import Worker

from batchllm_kernels.attention.cost import KernelCalibration
from batchllm_kernels.attention.reference import paged_attention
from batchllm_kernels.vllm_plugin import attention_backend
from batchllm_kernels.vllm_plugin.attention_backend import SharedAttentionImpl, SharedMetadataBuilder
from batchllm_kernels.vllm_plugin.block_table_mirror import HostTable, note
from batchllm_kernels.vllm_plugin.shared_flash_attn import SharedBuilder as OverFlashAttention
from tests.vllm_plugin.calibrations import free_launches

BLOCK = 16
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 32
SCALE = 0.2
PROMPT_BLOCKS = 4  # of the prefix that decode rows share


class StockBuilder:
    """Stands for a stock metadata builder: the metadata says which requests it is of."""

    def __init__(self, *_: Any) -> None:
        pass

    def build(self, _common_prefix_len: int, common: Any, _fast_build: bool = False) -> SimpleNamespace:
        return SimpleNamespace(rows=common)

    def build_for_cudagraph_capture(self, common: Any) -> SimpleNamespace:
        return self.build(0, common)


class StockImpl:
    """Stands for a stock implementation: plain attention over the rows of its metadata."""

    def __init__(self) -> None:
        self.scale, self.num_kv_heads = SCALE, KV_HEADS

    def forward(
        self, _layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, output: Any, *_: Any
    ) -> torch.Tensor:
        if metadata is None:
            return output.fill_(0)
        rows = metadata.rows
        tokens = rows.num_actual_tokens
        assert len(query) == len(key) == len(value) == len(output) >= tokens
        keys, values = kv_cache.transpose(1, 2).split(HEAD_SIZE, dim=-1)
        lengths = rows.block_table_tensor, rows.seq_lens, rows.query_start_loc
        output[:tokens] = paged_attention(query[:tokens], keys, values, *lengths, SCALE)
        return output


class Builder(SharedMetadataBuilder, StockBuilder):
    gain = 0.0

    @classmethod
    def calibration(cls, _shared_impl: str) -> KernelCalibration:
        return free_launches("test", minimum_gain=cls.gain)


class ReluctantBuilder(Builder):
    """Whose gate always says no."""

    gain = 2.0


class Impl(SharedAttentionImpl, StockImpl):
    implementation = "reference"


def builder(
    kind: type[Any] = Builder,
    graphs: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE,
    dtype: torch.dtype = torch.float32,
) -> Any:
    spec = FullAttentionSpec(BLOCK, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=dtype)
    config = SimpleNamespace(
        speculative_config=None,
        max_concurrent_batches=2,
        compilation_config=SimpleNamespace(
            static_forward_context={}, cudagraph_mode=graphs, max_cudagraph_capture_size=16
        ),
        parallel_config=SimpleNamespace(rank=0, cp_kv_cache_interleave_size=1, worker_cls=Worker, use_ubatching=False),
        use_v2_model_runner=False,
        model_config=SimpleNamespace(
            dtype=dtype,
            max_model_len=16 * BLOCK,
            get_num_attention_heads=lambda _: HEADS,
            rswa_window=None,
            is_mm_prefix_lm=False,
            hf_config=None,
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=256, max_num_seqs=16, async_scheduling=True),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=32),
        kernel_config=SimpleNamespace(enable_jit_warmup=False),
    )
    return kind(spec, ["layer"], config, torch.device("cpu"))


def step(query_lens: list[int], seq_lens: list[int], padding: int = 0) -> CommonAttentionMetadata:
    """A batch as vLLM pads it for a graph: rows of padding have no query token, no length, and vLLM's null block."""
    rows = len(query_lens)
    table = torch.zeros((rows + padding, 16), dtype=torch.int32)
    for row in range(rows):
        table[row] = torch.arange(16) + 100 + 16 * row
    table[:rows, :PROMPT_BLOCKS] = torch.arange(1, 1 + PROMPT_BLOCKS)
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(query_lens + [0] * padding)]).astype(np.int32))
    lengths = torch.tensor(seq_lens + [0] * padding, dtype=torch.int32)
    note(table, HostTable(table.numpy()))
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths.clone(),
        num_reqs=rows + padding,
        num_actual_tokens=int(starts[-1]) + padding,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=table,
        slot_mapping=torch.arange(int(starts[-1]) + padding),
    )


MIXED = ([1, 1, 1, 40, 7], [70, 75, 90, 110, 7])
DECODES = ([1, 1, 1], [70, 75, 90])


def layer_inputs(common: CommonAttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    cache = torch.randn((400, KV_HEADS, BLOCK, 2 * HEAD_SIZE), generator=generator)
    return torch.randn((common.num_actual_tokens + 3, HEADS, HEAD_SIZE), generator=generator), cache


def answers(metadata: Any, common: CommonAttentionMetadata) -> torch.Tensor:
    query, cache = layer_inputs(common)
    key = torch.zeros((len(query), KV_HEADS, HEAD_SIZE))
    output = torch.full_like(query, torch.nan)
    return Impl().forward(None, query, key, key, cache, metadata, output)


def expected(common: CommonAttentionMetadata) -> torch.Tensor:
    """Of the tokens that a request has; the others are NaN, as `answers` leaves them."""
    query, cache = layer_inputs(common)
    keys, values = cache.transpose(1, 2).split(HEAD_SIZE, dim=-1)
    lengths = common.block_table_tensor, common.seq_lens, common.query_start_loc
    tokens = int(common.query_start_loc[-1])
    output = torch.full_like(query, torch.nan)
    output[:tokens] = paged_attention(query[:tokens], keys, values, *lengths, SCALE)
    return output


def test_ours_runs_the_decode_rows_of_a_mixed_step_and_stock_those_of_prompts() -> None:
    common = step(*MIXED)
    metadata = builder().build(0, common)
    assert (metadata.decode_rows.count, metadata.decode_rows.prompts) == (3, True)
    assert metadata.decode_rows.plan.plan.shared_tokens == PROMPT_BLOCKS * BLOCK
    assert (metadata.rows.num_reqs, metadata.rows.num_actual_tokens, metadata.rows.max_query_len) == (2, 47, 40)
    assert metadata.rows.query_start_loc.tolist() == metadata.rows.query_start_loc_cpu.tolist() == [0, 40, 47]
    assert metadata.rows.seq_lens.tolist() == [110, 7]
    assert torch.equal(metadata.rows.block_table_tensor, common.block_table_tensor[3:])
    assert metadata.rows.slot_mapping.tolist() == list(range(3, 50))
    torch.testing.assert_close(answers(metadata, common), expected(common), equal_nan=True)


@pytest.mark.parametrize(("lengths", "padding"), [(MIXED, 0), (DECODES, 0), (DECODES, 5)])
def test_where_the_gate_says_no_one_stock_call_runs_all_rows(lengths: Any, padding: int) -> None:
    common = step(*lengths, padding)
    metadata = builder(ReluctantBuilder).build(0, common)
    assert metadata.decode_rows is None
    assert metadata.rows is common


@pytest.mark.parametrize("padding", [0, 5])
def test_ours_runs_a_step_of_decode_rows_alone_and_leaves_padding(padding: int) -> None:
    common = step(*DECODES, padding)
    metadata = builder().build(0, common)
    assert (metadata.decode_rows.count, metadata.decode_rows.prompts) == (3, False)
    assert metadata.rows is common
    torch.testing.assert_close(answers(metadata, common), expected(common), equal_nan=True)


@pytest.mark.parametrize(("kind", "scheduled"), [(Builder, [110, 7]), (ReluctantBuilder, [70, 75, 90, 110, 7])])
def test_flash_attention_3_schedules_the_rows_that_it_gets(
    monkeypatch: pytest.MonkeyPatch, kind: type[Builder], scheduled: list[int]
) -> None:
    asked: dict[str, Any] = {}

    def schedule(**rows: Any) -> torch.Tensor:
        asked.update(rows)
        return torch.arange(1, 6, dtype=torch.int32)

    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: 3)
    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", schedule, raising=False)
    monkeypatch.setattr(OverFlashAttention, "calibration", kind.calibration)
    metadata = builder(OverFlashAttention).build(0, step(*MIXED))
    assert asked["cache_seqlens"].tolist() == metadata.seq_lens.tolist() == scheduled
    assert asked["batch_size"] == len(scheduled)
    assert asked["cu_seqlens_q"] is metadata.query_start_loc
    assert metadata.query_start_loc.tolist()[-1] == metadata.num_actual_tokens == (47 if kind is Builder else 50)
    assert metadata.scheduler_metadata.tolist() == [1, 2, 3, 4, 5]


def test_a_single_decode_row_shares_with_nobody() -> None:
    common = step([1, 40], [70, 110])
    assert builder().build(0, common).decode_rows is None


def test_one_token_of_a_prompt_behind_others_is_left_to_stock() -> None:
    """vLLM's first model runner puts the first token of a prompt last, whatever its length."""
    common = step([1, 1, 9, 1], [70, 75, 109, 1])
    metadata = builder().build(0, common)
    assert metadata.decode_rows.count == 2
    assert metadata.rows.seq_lens.tolist() == [109, 1]
    torch.testing.assert_close(answers(metadata, common), expected(common), equal_nan=True)


class Captured:
    """A graph of one layer: captured with vLLM's dummy batch, it runs ours again with whatever plan is loaded."""

    def __init__(self, kind: type[Builder], rows: int) -> None:
        self.builder = builder(kind)
        self._table = torch.zeros((rows, 16), dtype=torch.int32)
        self._lengths = torch.ones(rows, dtype=torch.int32)
        dummy = step([1] * rows, [1] * rows)
        dummy.block_table_tensor, dummy.seq_lens = self._table, self._lengths
        self._metadata = self.builder.build_for_cudagraph_capture(dummy)

    def replay(self, common: CommonAttentionMetadata) -> torch.Tensor:
        self._table.copy_(common.block_table_tensor)
        note(self._table, HostTable(self._table.numpy()))
        self._lengths.copy_(common.seq_lens)
        common.block_table_tensor, common.seq_lens = self._table, self._lengths
        self.builder.build(0, common)
        return answers(self._metadata, common)


@pytest.mark.parametrize("kind", [Builder, ReluctantBuilder])
def test_a_captured_step_finds_a_plan_loaded_whatever_the_gate_says(kind: type[Builder]) -> None:
    graph = Captured(kind, rows=8)
    for query_lens, seq_lens in (DECODES, ([1], [33]), ([1] * 8, [70, 66, 81, 100, 7, 2, 65, 129])):
        common = step(query_lens, seq_lens, 8 - len(query_lens))
        torch.testing.assert_close(graph.replay(common), expected(common), equal_nan=True)


def test_a_mixed_step_between_two_replays_leaves_no_plan_behind() -> None:
    graph = Captured(Builder, rows=4)
    for lengths in (DECODES, MIXED, DECODES):
        if lengths is MIXED:
            mixed = step(*MIXED)
            torch.testing.assert_close(answers(graph.builder.build(0, mixed), mixed), expected(mixed), equal_nan=True)
            continue
        common = step(*lengths, 1)
        torch.testing.assert_close(graph.replay(common), expected(common), equal_nan=True)


def test_a_warm_up_before_a_capture_runs_all_launches_of_ours() -> None:
    """vLLM's first model runner builds it as any step."""
    for rows in (1, 4):
        warm_up = builder().build(0, step([1] * rows, [1] * rows))
        assert (warm_up.decode_rows.count, warm_up.decode_rows.every_launch) == (rows, True)
    assert builder(graphs=CUDAGraphMode.PIECEWISE).build(0, step([1] * 4, [1] * 4)).decode_rows is None


def test_a_dummy_batch_for_a_capture_shares_nothing_though_all_its_rows_have_the_same_blocks() -> None:
    dummy = step([1] * 4, [256] * 4)
    dummy.block_table_tensor = torch.zeros((4, 16), dtype=torch.int32)
    metadata = builder().build_for_cudagraph_capture(dummy)
    assert metadata.decode_rows.count == 4
    assert metadata.decode_rows.plan.plan.shared_tokens == 0


def test_partial_results_are_those_that_the_pass_by_which_vllm_profiles_memory_has_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Builders, with the plans, are made after the KV cache was sized."""
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=256, max_num_seqs=16, async_scheduling=True),
        cache_config=SimpleNamespace(block_size=BLOCK),
    )
    workspace.init_workspace_manager(torch.device("cpu"))
    try:
        query, cache = layer_inputs(step(*DECODES))
        monkeypatch.setattr(attention_backend, "get_current_vllm_config_or_none", lambda: config)
        profiled = Impl()
        key = torch.zeros((len(query), KV_HEADS, HEAD_SIZE))
        output = torch.full_like(query, torch.nan)
        assert not profiled.forward(None, query, key, key, cache, None, output).any()
        workspace.lock_workspace()  # nothing more can be allocated in it
        plan = builder().build_for_cudagraph_capture(step(*DECODES)).decode_rows.plan
        again = builder().build_for_cudagraph_capture(step(*DECODES)).decode_rows.plan
    finally:
        workspace.reset_workspace_manager()
    assert plan.partials.shape[1:] == (HEADS, HEAD_SIZE)
    assert plan.partials.data_ptr() == again.partials.data_ptr()
    assert plan.counts.data_ptr() != again.counts.data_ptr()


def test_vllm_is_told_that_decode_steps_can_be_captured_and_decodes_are_to_stand_first() -> None:
    assert Builder.get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert Builder.reorder_batch_threshold == 1
