"""Which attention an engine is started with, by vLLM's own selection for CUDA devices, and what its processes see."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import vllm.platforms
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability
from vllm.usage.usage_lib import UsageContext
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from batchllm_kernels.vllm_plugin import ATTENTION_VARIABLE
from batchllm_kernels.vllm_plugin.attention_choice import (
    AttentionChoice,
    Requested,
    UnsupportedAttentionError,
    start_with_attention,
)
from batchllm_kernels.vllm_plugin.attention_refusals import REFUSALS_VARIABLE, record, recorded
from batchllm_kernels.vllm_plugin.shared_flash_attn import SharedBackend as OverFlashAttention
from batchllm_kernels.vllm_plugin.shared_triton_attn import SharedBackend as OverTriton

MakeConfig = Callable[..., Any]
THIS_PLATFORM = vllm.platforms.current_platform
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 128},
    "mistral without": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 128,
        "layer_types": ["full_attention", "full_attention"],
    },
    "qwen3 with windows": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 128,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "gemma2": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 50.0,
        "sliding_window": None,
        "layer_types": ["full_attention", "full_attention"],
    },
    "bloom": {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "n_head": 2, "n_layer": 2},
    "deepseek": {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_key_value_heads": 2,
    },
    "wide heads": {"head_dim": 512},
}


@pytest.fixture(scope="module")
def make_config(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """Makes vLLM's finished configuration of a small model that is told apart by its `config.json`."""

    @cache
    def made(model: str, options: str) -> Any:
        folder = tmp_path_factory.mktemp("model")
        config = json.loads((Path(tiny_llama) / "config.json").read_text()) | MODELS[model]
        (folder / "config.json").write_text(json.dumps(config))
        arguments: dict[str, Any] = {"dtype": "bfloat16", "block_size": 32, "max_model_len": 512, "enforce_eager": True}
        arguments |= {"model": str(folder), "tokenizer": tiny_llama, "kv_cache_memory_bytes": 2**27}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vllm.platforms, "current_platform", THIS_PLATFORM)
            return EngineArgs(**(arguments | json.loads(options))).create_engine_config(UsageContext.LLM_CLASS)

    def make(model: str = "llama", **options: Any) -> Any:
        return copy.deepcopy(made(model, json.dumps(options)))

    return make


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> Iterator[Callable[..., None]]:
    """Makes vLLM's own code for CUDA choose, as on a device of some compute capability; by default an H100."""
    # Already imported: on a CPU vLLM's module of FlashAttention leaves out the kernels, which it lacks.
    assert OverFlashAttention.get_name() == "CUSTOM"
    if importlib.util.find_spec("vllm._C_stable_libtorch") is None:  # vLLM for CPUs lacks the kernels, not the choice
        monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", ModuleType("vllm._C_stable_libtorch"))
    from vllm.platforms.cuda import CudaPlatformBase

    def use(major: int = 9, minor: int = 0) -> None:
        class Device(CudaPlatformBase):
            @classmethod
            def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:  # noqa: ARG003  # vLLM's signature
                return DeviceCapability(major, minor)

        monkeypatch.setattr(vllm.platforms, "current_platform", Device())

    selector._cached_get_attn_backend.cache_clear()
    use()
    yield use
    selector._cached_get_attn_backend.cache_clear()


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in (ATTENTION_VARIABLE, REFUSALS_VARIABLE)}


class Starts:
    """Starts no engine, and keeps what the processes of each would have found."""

    def __init__(self, *failures: tuple[str | None, Exception]) -> None:
        self._failures = list(failures)
        self.seen: list[tuple[str | None, str | None, str | None]] = []

    def __call__(self, config: Any) -> str:
        custom = AttentionBackendEnum.CUSTOM
        self.seen.append(
            (
                config.attention_config.backend and config.attention_config.backend.name,
                environment().get(ATTENTION_VARIABLE),
                custom.get_path().split(".")[-2] if custom.is_overridden() else None,
            )
        )
        if self._failures:
            refusal, error = self._failures.pop(0)
            if refusal is not None:
                record(refusal)
            raise error
        return "the engine"


STOCK = (None, None, None)


def warnings_of_the_choice(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == start_with_attention.__module__]


def choice(requested: Requested, config: Any, starts: Starts | None = None) -> AttentionChoice:
    starts = starts or Starts()
    engine, chosen = start_with_attention(requested, lambda: copy.deepcopy(config), starts)
    assert engine == "the engine"
    assert not environment()
    return chosen


@pytest.mark.parametrize("requested", ["auto", "shared"])
@pytest.mark.parametrize(
    ("capability", "model", "options", "stock"),
    [
        ((9, 0), "llama", {}, "FLASH_ATTN"),
        ((8, 0), "llama", {}, "FLASH_ATTN"),
        ((7, 5), "llama", {"dtype": "float16"}, "TRITON_ATTN"),
        ((9, 0), "llama", {"dtype": "float32"}, "TRITON_ATTN"),
        ((9, 0), "mistral without", {}, "FLASH_ATTN"),
        ((9, 0), "qwen3", {}, "FLASH_ATTN"),
    ],
)
def test_prefix_sharing_stands_on_the_backend_that_vllm_would_choose(
    on_cuda: Callable[..., None],
    make_config: MakeConfig,
    requested: Requested,
    capability: tuple[int, int],
    model: str,
    options: dict[str, Any],
    stock: str,
) -> None:
    on_cuda(*capability)
    starts = Starts()
    chosen = choice(requested, make_config(model, **options), starts)
    assert str(chosen) == f"shared over {stock}"
    assert chosen.reasons == ()
    assert starts.seen == [("CUSTOM", stock, f"shared_{stock.lower()}")]
    assert not AttentionBackendEnum.CUSTOM.is_overridden()


UNSUPPORTED = [
    ("mistral", {}, "sliding window not supported"),
    ("qwen3 with windows", {}, "sliding window not supported"),
    ("gemma2", {}, "logits soft cap not supported"),
    ("bloom", {}, "alibi not supported"),
    ("deepseek", {}, "MLA not supported"),
    ("wide heads", {}, "head_size not supported"),
    ("llama", {"attention_backend": "TRITON_ATTN"}, "expected to be left to vLLM, got TRITON_ATTN"),
    ("llama", {"attention_config": {"backend_per_kind": {"full_attention": "FLASH_ATTN"}}}, "expected to be left to"),
    ("llama", {"attention_backend": "FLEX_ATTENTION"}, "expected to be left to vLLM, got FLEX_ATTENTION"),
    (
        "llama",
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "speculative decoding not supported",
    ),
]


@pytest.mark.parametrize(("model", "options", "reason"), UNSUPPORTED)
def test_what_is_not_supported_is_refused_before_the_engine_starts_or_stock_with_the_reason(
    on_cuda: object,
    make_config: MakeConfig,
    caplog: pytest.LogCaptureFixture,
    model: str,
    options: dict[str, Any],
    reason: str,
) -> None:
    config, starts = make_config(model, **options), Starts()
    with pytest.raises(UnsupportedAttentionError, match=reason):
        start_with_attention("shared", lambda: config, starts)
    assert starts.seen == []
    with caplog.at_level(logging.WARNING, "batchllm_kernels"):
        chosen = choice("auto", config, starts)
    assert not chosen.shared
    assert str(chosen) == f"stock ({chosen.stock})"
    assert reason in "; ".join(chosen.reasons)
    assert len(starts.seen) == 1
    assert starts.seen[0][1:] == (None, None)
    assert [reason in one for one in warnings_of_the_choice(caplog)] == [True]


def test_a_quantised_kv_cache_is_not_supported(on_cuda: object, make_config: MakeConfig) -> None:
    config = make_config()
    config.cache_config.cache_dtype = "fp8"
    chosen = choice("auto", config)
    assert not chosen.shared
    assert chosen.reasons == ("kv_cache_dtype not supported",)


@pytest.mark.parametrize("second_runner", [False, True])
@pytest.mark.parametrize(
    ("asked", "started"),
    [
        ("NONE", "NONE"),
        ("PIECEWISE", "PIECEWISE"),
        ("FULL_DECODE_ONLY", "FULL_DECODE_ONLY"),
        ("FULL_AND_PIECEWISE", "FULL_AND_PIECEWISE"),
    ],
)
def test_decode_steps_are_captured_whole_and_mixed_ones_in_pieces_as_the_job_or_vllm_asks(
    on_cuda: object,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    started: str,
    second_runner: bool,
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(second_runner)))
    mode, chosen = start_with_attention(
        "auto", lambda: with_graphs(make_config(), asked), lambda config: config.compilation_config.cudagraph_mode.name
    )
    assert (mode, chosen.shared, chosen.reasons) == (started, True, ())


def test_mixed_steps_cannot_be_captured_whole(on_cuda: object, make_config: MakeConfig) -> None:
    config = with_graphs(make_config(), "FULL")
    reason = (
        "cudagraph_mode FULL (steps with prompts captured whole; FULL_AND_PIECEWISE captures whole decode steps) "
        "not supported"
    )
    chosen = choice("auto", config)
    assert (chosen.shared, chosen.reasons) == (False, (reason,))
    with pytest.raises(UnsupportedAttentionError, match="FULL_AND_PIECEWISE captures whole decode steps"):
        start_with_attention("shared", lambda: config, Starts())


def with_graphs(config: Any, mode: str) -> Any:
    """A configuration with CUDA graphs, which vLLM's for a CPU has not."""
    compilation = config.compilation_config
    compilation.mode, compilation.cudagraph_mode = CompilationMode.VLLM_COMPILE, CUDAGraphMode[mode]
    compilation.splitting_ops = None  # none is left of a configuration for a CPU
    compilation.set_splitting_ops_for_v1(all2all_backend="naive", data_parallel_size=1)
    return config


def test_a_stock_backend_that_is_not_built_upon_is_named(on_cuda: object, make_config: MakeConfig) -> None:
    """As FlashInfer is on a Blackwell; here the one for a KV cache of a kind of its own."""
    config = make_config()
    config.cache_config.cache_dtype = "turboquant_k8v4"
    chosen = choice("auto", config)
    assert chosen.stock == "TURBOQUANT"
    assert chosen.reasons == (
        "vLLM's own attention backend on cuda: expected FLASH_ATTN or TRITON_ATTN, got TURBOQUANT",
    )


def test_a_cpu_takes_no_backend_but_its_own(make_config: MakeConfig) -> None:
    chosen = choice("auto", make_config())
    assert str(chosen) == "stock (CPU_ATTN)"
    assert "on cpu" in chosen.reasons[0]


@pytest.mark.parametrize(("model", "options", "_reason"), [("llama", {}, ""), *UNSUPPORTED])
def test_stock_leaves_everything_to_vllm(
    on_cuda: object, make_config: MakeConfig, model: str, options: dict[str, Any], _reason: str
) -> None:
    config, starts = make_config(model, **options), Starts()
    given = config.attention_config.backend
    chosen = choice("stock", config, starts)
    assert starts.seen == [(given.name if given else None, None, None)]
    assert (chosen.shared, chosen.reasons) == (False, ())


def test_where_vllm_names_no_backend_stock_goes_on_and_shared_is_refused_with_vllms_words(
    on_cuda: object, make_config: MakeConfig
) -> None:
    config = make_config(attention_backend="CUSTOM")
    chosen = choice("stock", config)
    assert str(chosen) == "stock"
    assert "CUSTOM must be registered" in chosen.reasons[0]
    plain = make_config()
    plain.cache_config.cache_dtype = "fp8_ds_mla"
    assert "No valid attention backend" in choice("auto", plain).reasons[0]
    with pytest.raises(UnsupportedAttentionError, match="No valid attention backend"):
        start_with_attention("shared", lambda: plain, Starts())


def test_another_plugins_backend_is_left_in_its_place(on_cuda: object, make_config: MakeConfig) -> None:
    theirs = "elsewhere.TheirBackend"
    register_backend(AttentionBackendEnum.CUSTOM, theirs)
    try:
        chosen = choice("auto", make_config())
        assert chosen.reasons == (f"vLLM's attention backend CUSTOM: expected to be free, got {theirs}",)
        assert AttentionBackendEnum.CUSTOM.get_path() == theirs
    finally:
        AttentionBackendEnum.CUSTOM.clear_override()


def test_our_plugin_must_be_among_those_that_vllm_loads(
    on_cuda: object, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other,batchllm")
    assert choice("auto", make_config()).shared
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert choice("auto", make_config()).reasons == ("VLLM_PLUGINS: expected 'batchllm' among them, got 'other'",)


def test_a_refusal_while_the_model_is_built_starts_the_engine_again_without_ours(
    on_cuda: object, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    starts = Starts(("sinks: expected one of (None,)", RuntimeError("Engine core initialization failed.")))
    with caplog.at_level(logging.WARNING, "batchllm_kernels"):
        chosen = choice("auto", make_config(), starts)
    assert chosen == AttentionChoice(shared=False, stock="FLASH_ATTN", reasons=("sinks: expected one of (None,)",))
    assert starts.seen == [("CUSTOM", "FLASH_ATTN", "shared_flash_attn"), STOCK]
    assert len(warnings_of_the_choice(caplog)) == 1


def test_a_refusal_while_the_model_is_built_is_an_error_where_shared_is_asked_for(
    on_cuda: object, make_config: MakeConfig
) -> None:
    failed = RuntimeError("Engine core initialization failed.")
    with pytest.raises(UnsupportedAttentionError, match="sinks: expected") as caught:
        start_with_attention("shared", make_config, Starts(("sinks: expected one of (None,)", failed)))
    assert caught.value.__cause__ is failed
    assert not environment()
    assert not AttentionBackendEnum.CUSTOM.is_overridden()


@pytest.mark.parametrize("requested", ["auto", "shared"])
def test_an_engine_that_fails_for_another_reason_is_not_started_again(
    on_cuda: object, make_config: MakeConfig, requested: Requested
) -> None:
    starts = Starts((None, RuntimeError("CUDA out of memory")))
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        start_with_attention(requested, make_config, starts)
    assert len(starts.seen) == 1
    assert not environment()


def test_layers_say_why_they_refuse_to_who_started_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REFUSALS_VARIABLE, str(tmp_path / "refusals.jsonl"))
    plain = {"num_heads": 2, "head_size": 64, "scale": 0.125, "num_kv_heads": 1, "alibi_slopes": None,
             "sliding_window": None, "kv_cache_dtype": "auto"}  # fmt: skip
    OverTriton.get_impl_cls()(**plain)
    assert recorded(tmp_path / "refusals.jsonl") == ()
    for _ in range(2):  # as several layers do
        with pytest.raises(ValueError, match="logits_soft_cap") as caught:
            OverTriton.get_impl_cls()(**plain, logits_soft_cap=30.0)
    assert recorded(tmp_path / "refusals.jsonl") == (str(caught.value),)


def test_vllm_fuses_no_output_quantisation_into_attention_that_may_be_shared() -> None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    made = [one(2, 64, 0.125, 1, None, None, "auto") for one in (TritonAttentionImpl, OverTriton.get_impl_cls())]
    assert [one.fused_output_quant_supported(kFp8StaticTensorSym) for one in made] == [True, False]
