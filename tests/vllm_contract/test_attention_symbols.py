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
    """The mode that vLLM's model runner ends up with for a backend that is never captured."""
    from vllm.v1.attention.backend import AttentionCGSupport

    chosen = compiled(mode).resolve_cudagraph_mode_and_sizes(
        AttentionCGSupport.NEVER, "SharedBackend", use_v2_model_runner=use_v2_model_runner
    )
    return str(chosen.name)


@pytest.mark.parametrize("use_v2_model_runner", [False, True])
@pytest.mark.parametrize(
    ("mode", "expected"),
    [("FULL_AND_PIECEWISE", "PIECEWISE"), ("FULL_DECODE_ONLY", "PIECEWISE"), ("PIECEWISE",) * 2, ("NONE",) * 2],
)
def test_where_attention_is_never_captured_cuda_graphs_are_of_the_pieces_between(
    mode: str, expected: str, use_v2_model_runner: bool
) -> None:
    assert resolved(mode, use_v2_model_runner=use_v2_model_runner) == expected
    assert compiled(mode).splitting_ops_contain_attention()


def test_where_attention_is_never_captured_whole_steps_cannot_be() -> None:
    from vllm.config import CUDAGraphMode

    with pytest.raises(ValueError, match="FULL is not supported with SharedBackend backend"):
        resolved("FULL")
    whole = [mode.name for mode in CUDAGraphMode if mode.mixed_mode() == CUDAGraphMode.FULL]
    assert whole == ["FULL"]


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
