"""What `vllm_plugin/attention_choice.py` relies on in vLLM, symbol by symbol; no model is loaded."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

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
