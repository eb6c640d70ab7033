"""The dtype of an engine on a CPU: by the processor, by the weights, and by the memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.machine.processor import Processor
from batchllm_operators.models.dtype_choice import GIB, check_memory, choose_dtype
from batchllm_operators.models.model_shape import model_shape, read_model_config
from batchllm_operators.specs.execution import ModelSpec

FAST = Processor(True, False, avx512=True, reason="the processor has AVX512-BF16")
SLOW = Processor(False, False, avx512=False, reason="the processor has neither AVX512-BF16 nor AMX-BF16")
UNKNOWN = Processor(None, None, avx512=False, reason="nothing is known of bfloat16 on ppc64le")

SMOLLM2_135M = {
    "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_3_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "dtype": "bfloat16",
}  # fmt: skip
QWEN_2_7B = {
    "hidden_size": 3584, "num_hidden_layers": 28, "vocab_size": 152064, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944,
}  # fmt: skip
MIXTRAL_8X7B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN3_30B_A3B = {
    "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 151936, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip


def model(dtype: str = "auto", identity: str = "m") -> ModelSpec:
    return ModelSpec.model_validate({"id": identity, "dtype": dtype})


@pytest.mark.parametrize(
    ("dtype", "processor", "config", "chosen", "reason", "warns"),
    [
        ("auto", FAST, {}, "bfloat16", "model.dtype auto: the processor has AVX512-BF16", False),
        ("auto", SLOW, {}, "float32", "model.dtype auto: bfloat16 is 5 to 8 times slower than float32 here", False),
        ("auto", SLOW, {"dtype": "bfloat16"}, "float32", "neither AVX512-BF16 nor AMX-BF16", False),
        ("auto", FAST, {"dtype": "float16"}, "bfloat16", "model.dtype auto", False),
        ("auto", UNKNOWN, {}, "auto", "nothing is known of bfloat16 on ppc64le", False),
        ("auto", SLOW, {"quantization_config": {"bits": 4}}, "auto", "quantised weights", False),
        ("auto", SLOW, {"text_config": {"quantization_config": {"bits": 4}}}, "auto", "quantised weights", False),
        ("bfloat16", FAST, {}, "bfloat16", "the job (model.dtype: bfloat16)", False),
        ("bfloat16", SLOW, {}, "bfloat16", "5 to 8 times slower than float32 here", True),
        ("float16", SLOW, {}, "float16", "5 to 8 times slower than float32 here", True),
        ("float16", FAST, {}, "float16", "here: the processor has no instructions for it", True),
        ("float32", SLOW, {}, "float32", "the job (model.dtype: float32)", False),
        ("bfloat16", UNKNOWN, {}, "bfloat16", "the job (model.dtype: bfloat16)", False),
    ],
)
def test_auto_is_what_the_processor_is_fast_at_and_a_slow_wish_is_granted_with_a_warning(
    dtype: str, processor: Processor, config: dict[str, Any], chosen: str, reason: str, warns: bool
) -> None:
    choice = choose_dtype(model(dtype), processor, config)
    assert choice.dtype == chosen
    assert reason in (choice.reason or "")
    assert (choice.warning is not None) is warns
    if choice.warning:
        assert choice.warning.startswith(f"model.dtype: {dtype} is 5 to 8 times slower than float32 here")
        assert choice.warning.endswith("set auto or float32")


def test_float32_weights_that_do_not_fit_are_refused_with_both_sizes() -> None:
    expected = r"model.dtype: auto is float32 here, which needs 29.9 GiB .* the 16.0 GiB that are free"
    with pytest.raises(TerminalError, match=expected):
        check_memory(model(), "float32", LLAMA_3_8B, free_bytes=16 * GIB)


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        ("float32", SMOLLM2_135M),
        ("bfloat16", LLAMA_3_8B),
        ("float32", {}),
        ("float32", LLAMA_3_8B | {"quantization_config": {}, "text_config": {"quantization_config": {"bits": 4}}}),
    ],
    ids=["fits", "half precision", "of unknown size", "quantised"],
)
def test_what_fits_or_cannot_be_known_is_not_refused(dtype: str, config: dict[str, Any]) -> None:
    check_memory(model(), dtype, config, free_bytes=16 * GIB)


def test_the_files_of_a_folder_say_more_than_its_configuration(tmp_path: Path) -> None:
    with (tmp_path / "model-00001-of-00001.safetensors").open("wb") as file:
        file.truncate(2 * GIB)
    check = {"config": {"dtype": "bfloat16"}, "dtype": "float32"}
    check_memory(model(identity=str(tmp_path)), **check, free_bytes=5 * GIB)  # type: ignore[arg-type]
    with pytest.raises(TerminalError, match=r"needs 4\.0 GiB"):
        check_memory(model(identity=str(tmp_path)), **check, free_bytes=3 * GIB)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "billions", "active_billions", "kv_bytes"),
    [
        (SMOLLM2_135M, 0.1345, 0.1345, 23_040),
        (LLAMA_3_8B, 8.03, 7.50, 131_072),
        (QWEN_2_7B, 7.61, 7.07, 57_344),
        (MIXTRAL_8X7B, 46.7, 12.7, 131_072),
        (QWEN3_30B_A3B, 30.5, 3.03, 98_304),
        ({"text_config": LLAMA_3_8B, "vision_config": {"hidden_size": 1}}, 8.03, 7.50, 131_072),
    ],
    ids=["SmolLM2-135M", "Llama-3-8B", "Qwen2-7B", "Mixtral-8x7B", "Qwen3-30B-A3B", "with another tower"],
)
def test_the_size_of_known_models_follows_from_their_configuration(
    config: dict[str, Any], billions: float, active_billions: float, kv_bytes: int
) -> None:
    shape = model_shape(config)
    assert shape is not None
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert shape.active_parameters / 1e9 == pytest.approx(active_billions, rel=0.02)
    assert 2 * shape.kv_values == kv_bytes


@pytest.mark.parametrize("config", [{}, {"hidden_size": 8}, SMOLLM2_135M | {"hidden_size": "large"}], ids=str)
def test_a_configuration_of_another_kind_tells_no_size(config: dict[str, Any]) -> None:
    assert model_shape(config) is None


@pytest.mark.parametrize(
    ("content", "read"), [('{"hidden_size": 8}', {"hidden_size": 8}), ("[1]", {}), ("{", {})], ids=str
)
def test_the_configuration_of_a_folder_is_read_and_a_damaged_one_is_none(
    content: str, read: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(content)
    assert read_model_config(model(identity=str(tmp_path))) == read


def test_a_model_that_is_nowhere_has_no_configuration_and_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "batchllm_operators"):
        assert read_model_config(model(identity="nobody/nothing")) == {}
    assert "model.id: no configuration of 'nobody/nothing'" in caplog.text
