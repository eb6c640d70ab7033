"""What the plugin's attention relies on in vLLM, symbol by symbol; no model is loaded."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.usefixtures("vllm")


def test_layers_get_their_backend_from_the_selector_with_what_we_pass() -> None:
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.attention.selector import get_attn_backend

    parameters = inspect.signature(get_attn_backend).parameters
    assert list(parameters)[:3] == ["head_size", "dtype", "kv_cache_dtype"]
    assert {"use_mla", "use_mm_prefix", "has_sliding_window"} <= set(parameters)
    assert "get_attn_backend(" in inspect.getsource(Attention.__init__)


def test_the_selector_reads_the_config_that_is_current_and_its_attention_backend(tiny_llama: str) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import get_attn_backend

    config = EngineArgs(tiny_llama, enforce_eager=True, attention_backend="CUSTOM").create_engine_config()
    assert config.attention_config.backend is AttentionBackendEnum.CUSTOM
    assert config.attention_config.backend_per_kind == {}
    config.attention_config.backend = None
    with set_current_vllm_config(config):
        assert get_attn_backend(32, config.model_config.dtype, "auto").get_name() == "CPU_ATTN"


def test_a_backend_that_is_given_is_validated_and_refused_with_a_value_error(vllm: Any) -> None:
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.selector import AttentionSelectorConfig

    asked = set(inspect.signature(AttentionBackend.validate_configuration).parameters)
    assert asked - {"device_capability"} == set(AttentionSelectorConfig._fields)
    # Read, not imported: its import needs kernels that vLLM for CPUs lacks.
    source = Path(inspect.getfile(vllm.platforms)).with_name("cuda.py").read_text()
    chosen = source[source.index("def get_attn_backend_cls") : source.index("def get_supported_vit_attn_backends")]
    given = chosen[chosen.index("if selected_backend is not None:") : chosen.index("# No selected backend")]
    assert "validate_configuration(" in given
    assert given.count("raise ValueError(") == 2


def test_the_custom_backend_can_be_registered_asked_for_and_let_go() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    assert not custom.is_overridden()
    try:
        register_backend(custom, "some.module.Backend")
        assert custom.is_overridden()
        assert custom.get_path() == "some.module.Backend"
    finally:
        custom.clear_override()
    assert not custom.is_overridden()


def test_the_model_config_tells_which_attention_a_model_has() -> None:
    from vllm.config import CacheConfig, ModelConfig, VllmConfig

    for name in (
        "use_mla",
        "uses_alibi",
        "is_attention_free",
        "is_mm_prefix_lm",
        "get_head_size",
        "get_sliding_window",
    ):
        assert hasattr(ModelConfig, name), name
    assert "self.attention_chunk_size =" in inspect.getsource(ModelConfig)
    assert {"dtype", "hf_text_config"} <= {one.name for one in dataclasses.fields(ModelConfig)}
    assert "cache_dtype" in {one.name for one in dataclasses.fields(CacheConfig)}
    assert {"attention_config", "speculative_config"} <= {one.name for one in dataclasses.fields(VllmConfig)}


def test_the_plugins_are_loaded_in_the_engine_core_and_its_workers_as_the_environment_lists_them() -> None:
    from vllm import envs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    assert "VLLM_PLUGINS" in envs.environment_variables
    assert "load_general_plugins()" in inspect.getsource(EngineCore.__init__)
    assert "load_general_plugins()" in inspect.getsource(WorkerWrapperBase.init_worker)


def test_the_platform_has_the_name_of_its_kind_of_device() -> None:
    from vllm import platforms

    assert platforms.current_platform.device_name == "cpu" or not platforms.current_platform.is_cpu()


def test_an_implementation_says_whether_its_output_may_be_quantised_in_place() -> None:
    from vllm.v1.attention.backend import AttentionImpl

    assert list(inspect.signature(AttentionImpl.fused_output_quant_supported).parameters) == ["self", "quant_key"]


def compiled(mode: str) -> Any:
    """How a model is compiled where vLLM decides, with CUDA graphs of a mode."""
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode[mode])
    config.set_splitting_ops_for_v1(all2all_backend="naive", data_parallel_size=1)
    return config


def resolved(mode: str, *, use_v2_model_runner: bool = False) -> str:
    """The mode that vLLM's model runner ends up with where steps of one query token a request can be captured."""
    from vllm.v1.attention.backend import AttentionCGSupport

    chosen = compiled(mode).resolve_cudagraph_mode_and_sizes(
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, "SharedBackend", use_v2_model_runner=use_v2_model_runner
    )
    return str(chosen.name)


@pytest.mark.parametrize("use_v2_model_runner", [False, True])
@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY", "PIECEWISE", "NONE"])
def test_where_decode_steps_can_be_captured_the_modes_that_capture_them_stay(
    mode: str, use_v2_model_runner: bool
) -> None:
    assert resolved(mode, use_v2_model_runner=use_v2_model_runner) == mode
    assert compiled(mode).splitting_ops_contain_attention()


def test_only_one_mode_captures_whole_steps_with_prompts() -> None:
    from vllm.config import CUDAGraphMode

    whole = [mode.name for mode in CUDAGraphMode if mode.mixed_mode() == CUDAGraphMode.FULL]
    assert whole == ["FULL"]
    decodes = [mode.name for mode in CUDAGraphMode if mode.decode_mode() == CUDAGraphMode.FULL]
    assert decodes == ["FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"]


def test_a_builder_says_what_of_it_can_be_captured_and_makes_the_metadata_of_captures() -> None:
    from vllm.v1.attention.backend import AttentionMetadataBuilder
    from vllm.v1.worker.gpu import attn_utils
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for asks in (attn_utils.get_attn_cg_support, GPUModelRunner._check_and_update_cudagraph_mode):
        assert ".get_cudagraph_support(" in inspect.getsource(asks)
    for builds in (attn_utils.build_attn_metadata, GPUModelRunner._build_attention_metadata):
        assert "build_metadata_for_cudagraph_capture(" in inspect.getsource(builds)
    assert "self.build(" in inspect.getsource(AttentionMetadataBuilder.build_for_cudagraph_capture)


def test_the_second_model_runner_puts_requests_with_one_token_first() -> None:
    from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

    assert sort_batch_req_ids({"prompt": 40, "a": 1, "end of a prompt": 7, "b": 1}, {}, 1) == [
        "a",
        "b",
        "end of a prompt",
        "prompt",
    ]


def test_the_first_model_runner_puts_decodes_first_where_a_builder_asks_for_it() -> None:
    import numpy as np
    from vllm.v1.attention.backends.utils import reorder_batch_to_split_decodes_and_prefills
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    class Batch:
        req_ids: list[str] = ["first chunk", "a", "next chunk", "b", "first token"]  # noqa: RUF012  # vLLM's
        num_computed_tokens_cpu = np.array([0, 50, 30, 60, 0])
        num_prompt_tokens = np.array([40, 50, 90, 55, 1])

        def swap_states(self, a: int, b: int) -> None:
            self.req_ids[a], self.req_ids[b] = self.req_ids[b], self.req_ids[a]
            for numbers in (self.num_computed_tokens_cpu, self.num_prompt_tokens):
                numbers[[a, b]] = numbers[[b, a]]

    class Step:
        num_scheduled_tokens = dict(zip(Batch.req_ids, [40, 1, 16, 1, 1], strict=True))  # noqa: RUF012  # vLLM's

    batch = Batch()
    reorder_batch_to_split_decodes_and_prefills(batch, Step(), decode_threshold=1)
    assert set(batch.req_ids[:2]) == {"a", "b"}
    assert batch.req_ids[2] == "next chunk"  # prompts without context stand last, those of one token included
    assert "reorder_batch_threshold" in inspect.getsource(GPUModelRunner.calculate_reorder_batch_threshold)
    assert "decode_threshold=self.reorder_batch_threshold" in inspect.getsource(GPUModelRunner._may_reorder_batch)


def test_a_batch_is_told_apart_and_sliced_by_vllms_own_functions() -> None:
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends.utils import split_decodes_and_prefills
    from vllm.v1.worker.ubatch_utils import UBatchSlice, split_attn_metadata

    starts = torch.tensor([0, 1, 2, 12, 13], dtype=torch.int32)
    lengths = torch.tensor([9, 8, 10, 1], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=4,
        num_actual_tokens=13,
        max_query_len=10,
        max_seq_len=10,
        block_table_tensor=torch.arange(8).reshape(4, 2),
        slot_mapping=torch.arange(13),
    )
    assert split_decodes_and_prefills(common) == (2, 2, 2, 11)
    [prompts] = split_attn_metadata([UBatchSlice(slice(2, 4), slice(2, 13))], common)
    assert prompts.query_start_loc.tolist() == prompts.query_start_loc_cpu.tolist() == [0, 10, 11]
    assert (prompts.num_reqs, prompts.num_actual_tokens, prompts.max_query_len) == (2, 11, 10)
    assert prompts.seq_lens.tolist() == prompts.seq_lens_cpu_upper_bound.tolist() == [10, 1]
    assert (prompts.block_table_tensor.tolist(), prompts.causal) == ([[4, 5], [6, 7]], True)
    assert starts.tolist() == [0, 1, 2, 12, 13]


@pytest.mark.parametrize(("sequences", "largest", "captured"), [(1024, 1024, 1024), (1024, None, 512), (64, None, 128)])
def test_vllm_captures_steps_up_to_a_size_in_spaces_that_we_know(
    tiny_llama: str, sequences: int, largest: int | None, captured: int
) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    from batchllm_operators.execute.engine_options import VLLM_LARGEST_GRAPH, graph_sizes

    config = EngineArgs(
        tiny_llama, max_num_seqs=sequences, max_num_batched_tokens=2048, kv_cache_memory_bytes=2**27
    ).create_engine_config()
    compilation = config.compilation_config
    # A configuration for a CPU captures nothing; what follows is how it was made for a GPU.
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = None, largest
    config._set_cudagraph_sizes()
    assert compilation.cudagraph_capture_sizes == graph_sizes(captured)
    assert compilation.max_cudagraph_capture_size == captured
    assert largest is not None or captured == min(2 * sequences, VLLM_LARGEST_GRAPH)
    dispatcher = CudagraphDispatcher(config)
    dispatcher.initialize_cudagraph_keys(compilation.cudagraph_mode)
    mode, batch = dispatcher.dispatch(sequences - 5, uniform_decode=True)
    covered = captured >= sequences
    assert (mode.name, batch.num_tokens) == (("FULL", sequences) if covered else ("NONE", sequences - 5))


def test_sizes_that_are_given_are_taken_as_they_are() -> None:
    from vllm.engine.arg_utils import EngineArgs

    assert {"max_cudagraph_capture_size", "cudagraph_capture_sizes"} <= set(inspect.signature(EngineArgs).parameters)


def test_memory_is_profiled_with_a_forward_pass_without_metadata_before_the_kv_cache_is_sized() -> None:
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    profiles = inspect.getsource(gpu_worker.Worker.determine_available_memory)
    assert "self.model_runner.profile_run(" in profiles
    assert profiles.index("memory_profiling(") < profiles.rindex("self.model_runner.profile_run(")
    assert profiles.rindex("self.model_runner.profile_run(") < profiles.index("self.available_kv_cache_memory_bytes =")
    assert "skip_attn=True" in inspect.getsource(GPUModelRunner.profile_run)
    assert "attn_metadata = None" in inspect.getsource(GPUModelRunner.execute_model)
    assert "init_workspace_manager(" in inspect.getsource(gpu_worker.Worker._init_workspace_and_model_runner)


def test_a_persistent_workspace_is_made_once_and_not_after_the_capture() -> None:
    import torch
    from vllm.v1.worker.workspace import WorkspaceManager

    manager = WorkspaceManager(torch.device("cpu"))
    first = manager.get_persistent("ours", (3, 4), torch.float32)
    assert manager.get_persistent("ours", (3, 4), torch.float32) is first
    manager.lock()
    assert manager.get_persistent("ours", (3, 4), torch.float32) is first
    with pytest.raises(AssertionError, match="not allocated during"):
        manager.get_persistent("another", (3, 4), torch.float32)


@pytest.fixture
def tables_of_the_second_runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """With two KV cache groups, on the host, as vLLM's CPU worker has them; no kernel runs until writes are applied."""
    from vllm.v1.worker.cpu.buffer_utils import UvaBuffer
    from vllm.v1.worker.gpu import buffer_utils
    from vllm.v1.worker.gpu.block_table import BlockTables

    monkeypatch.setattr(buffer_utils, "UvaBuffer", UvaBuffer)
    return BlockTables(
        block_sizes=[16, 32],
        max_num_reqs=4,
        max_num_batched_tokens=64,
        max_num_blocks_per_group=[8, 4],
        device=torch.device("cpu"),
    )


def test_the_second_runner_takes_block_ids_by_one_method_with_or_without_what_was_there() -> None:
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    parameters = list(inspect.signature(BlockTables.append_block_ids).parameters)
    assert parameters == ["self", "req_index", "new_block_ids", "overwrite"]
    runner = inspect.getsource(GPUModelRunner)
    assert runner.count("self.block_tables.append_block_ids(") == 2
    assert runner.count(".stage_write(") == 0
    assert inspect.getsource(BlockTables).count(".stage_write(") == 1
    assert BlockTables.redirect_writes_to_null_block is False


def test_the_second_runner_counts_the_blocks_of_each_row_on_the_host(tables_of_the_second_runner: Any) -> None:
    tables = tables_of_the_second_runner
    assert [tuple(table.gpu.shape) for table in tables.block_tables] == [(4, 8), (4, 4)]
    tables.append_block_ids(1, ([3, 4], [5]), overwrite=True)
    tables.append_block_ids(1, ([6], []), overwrite=False)
    assert tables.num_blocks.np[:, 1].tolist() == [3, 1]
    tables.append_block_ids(1, ([7], [8]), overwrite=True)
    assert tables.num_blocks.np[:, 1].tolist() == [1, 1]


def test_the_second_runner_makes_a_steps_tables_by_one_method_and_dummies_by_another(
    tables_of_the_second_runner: Any,
) -> None:
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    assert "self.block_tables.gather_block_tables(" in inspect.getsource(GPUModelRunner.prepare_attn)
    assert "get_dummy_block_tables(" in inspect.getsource(GPUModelRunner.prepare_dummy_attn)
    gathering = inspect.getsource(BlockTables.gather_block_tables)
    assert "return tuple(bt[:num_reqs_padded] for bt in out)" in gathering, "tensors of this call, with what is noted"
    tables = tables_of_the_second_runner
    first, again = tables.get_dummy_block_tables(4), tables.get_dummy_block_tables(4)
    assert len(first) == 2
    assert first[0] is not again[0], "what is noted on one does not stay for the next"


def test_the_second_runner_makes_metadata_builders_before_its_tables() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner)
    assert source.count("self.block_tables = BlockTables(") == 1
    assert source.index("init_attn_backend(") < source.index("self.block_tables = BlockTables(")


def test_a_metadata_builder_gets_the_table_itself_and_the_rows_of_its_requests() -> None:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    needed = {"block_table_tensor", "req_idx", "num_reqs", "max_seq_len", "seq_lens_cpu_upper_bound"}
    assert needed <= {one.name for one in dataclasses.fields(CommonAttentionMetadata)}
    building = inspect.getsource(build_attn_metadata)
    assert "block_table = block_tables[i]" in building
    assert "block_table_tensor=block_table," in building
    assert "req_idx=input_batch.idx_mapping_np," in inspect.getsource(DefaultModelState.prepare_attn)


def test_a_builder_gets_the_same_metadata_where_blocks_of_cache_and_kernel_are_of_one_size() -> None:
    from vllm.v1.worker.utils import AttentionGroup

    group = AttentionGroup(backend=object, layer_names=[], kv_cache_spec=None, kv_cache_group_id=0)
    metadata = object()
    assert group.kernel_block_size is None
    assert group._with_kernel_block_table(metadata) is metadata


def test_the_first_runner_copies_a_table_of_the_host_to_the_device_and_hands_the_copy_on() -> None:
    from vllm.v1.worker.block_table import BlockTable
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    table = BlockTable(16, 4, 8, 64, False, torch.device("cpu"), 1)
    table.add_row([3, 4], 1)
    table.commit_block_table(2)
    assert isinstance(table.get_numpy_array(), np.ndarray)
    assert table.get_numpy_array()[1, :2].tolist() == [3, 4]
    assert table.get_device_tensor(2)[1, :2].tolist() == [3, 4]
    assert table.get_device_tensor(2) is not table.get_device_tensor(2)
    building = inspect.getsource(GPUModelRunner._build_attention_metadata)
    assert "blk_table_tensor = blk_table.get_device_tensor(num_reqs_padded)" in building
    assert "seq_lens_cpu_upper_bound = self.optimistic_seq_lens_cpu[:num_reqs_padded]" in building


def test_the_config_tells_which_worker_and_which_runner_an_engine_has() -> None:
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.worker.gpu_worker import Worker

    assert issubclass(resolve_obj_by_qualname("vllm.v1.worker.cpu_worker.CPUWorker"), Worker)
    assert "worker_cls" in {one.name for one in dataclasses.fields(ParallelConfig)}
    assert ParallelConfig(ubatch_size=2).use_ubatching
    assert not ParallelConfig().use_ubatching
    assert {"use_v2_model_runner", "max_concurrent_batches"} <= set(dir(VllmConfig))
