"""The rates of hardware and model where nothing was measured: what scales with what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchllm_operators.cost import CPU_DEFAULT, GPU_DEFAULT
from batchllm_operators.machine.processor import Processor
from batchllm_operators.models.model_shape import ModelShape
from batchllm_operators.plan.hardware_rates import (
    CPU_REFERENCE,
    EMULATED_SPEED,
    FLOAT32_SPEED,
    GPU_REFERENCE,
    cpu_rates,
    default_rates,
    gpu_rates,
)
from batchllm_operators.specs.execution import ExecutionSpec, ModelSpec

TURIN = Processor(True, False, avx512=True, reason="")
SKYLAKE = Processor(False, False, avx512=True, reason="")
ZEN3 = Processor(False, False, avx512=False, reason="")


def ten_times(shape: ModelShape) -> ModelShape:
    return ModelShape(
        parameters=10 * shape.parameters,
        active_parameters=10 * shape.active_parameters,
        kv_values=10 * shape.kv_values,
    )


def test_the_reference_has_the_rates_that_were_measured_on_it() -> None:
    assert cpu_rates(None, TURIN, cores=2, dtype="bfloat16") == CPU_DEFAULT
    assert cpu_rates(CPU_REFERENCE, TURIN, cores=2, dtype="bfloat16") == CPU_DEFAULT
    assert gpu_rates(None).model_dump() == pytest.approx(GPU_DEFAULT.model_dump(), rel=0.01)


def test_a_model_of_ten_times_the_size_takes_ten_times_as_long_and_its_cache_holds_a_tenth() -> None:
    rates = cpu_rates(ten_times(CPU_REFERENCE), TURIN, cores=2, dtype="bfloat16")
    assert rates.step_seconds == pytest.approx(10 * CPU_DEFAULT.step_seconds)
    assert rates.prefill_tokens_per_second == pytest.approx(CPU_DEFAULT.prefill_tokens_per_second / 10)
    assert rates.decode_tokens_per_second == pytest.approx(CPU_DEFAULT.decode_tokens_per_second / 10)
    assert rates.kv_tokens_per_second == pytest.approx(CPU_DEFAULT.kv_tokens_per_second / 10)
    assert rates.kv_capacity_tokens == CPU_DEFAULT.kv_capacity_tokens / 10


@pytest.mark.parametrize(
    ("cpu", "dtype", "arithmetic", "bytes_over_bfloat16"),
    [
        (TURIN, "bfloat16", 1.0, 1),
        (TURIN, "float32", FLOAT32_SPEED[True], 2),
        (SKYLAKE, "float32", FLOAT32_SPEED[True], 2),
        (ZEN3, "float32", FLOAT32_SPEED[False], 2),
        (ZEN3, "bfloat16", FLOAT32_SPEED[False] * EMULATED_SPEED, 1),
    ],
)
def test_the_processor_and_the_dtype_decide_how_fast_a_token_is_computed_and_read(
    cpu: Processor, dtype: str, arithmetic: float, bytes_over_bfloat16: int
) -> None:
    rates = cpu_rates(None, cpu, cores=2, dtype=dtype)
    assert rates.prefill_tokens_per_second == pytest.approx(arithmetic * CPU_DEFAULT.prefill_tokens_per_second)
    assert rates.step_seconds == pytest.approx(bytes_over_bfloat16 * CPU_DEFAULT.step_seconds)
    assert rates.kv_capacity_tokens * bytes_over_bfloat16 == CPU_DEFAULT.kv_capacity_tokens


def test_more_cores_compute_faster_and_read_faster_until_the_memory_is_busy() -> None:
    sixteen, hundred = (cpu_rates(None, TURIN, cores=cores, dtype="bfloat16") for cores in (16, 100))
    assert sixteen.prefill_tokens_per_second == pytest.approx(8 * CPU_DEFAULT.prefill_tokens_per_second)
    assert hundred.prefill_tokens_per_second == pytest.approx(50 * CPU_DEFAULT.prefill_tokens_per_second)
    assert sixteen.step_seconds == hundred.step_seconds == pytest.approx(CPU_DEFAULT.step_seconds / 8)


def test_a_larger_model_leaves_less_of_a_gpu_for_the_cache_and_more_gpus_hold_more() -> None:
    large = ten_times(GPU_REFERENCE)
    one, four = gpu_rates(large), gpu_rates(large, gpus=4)
    assert one.kv_capacity_tokens == 10_000
    assert four.kv_capacity_tokens == pytest.approx((4 * 68.5e9 - 2 * 80.3e9) / (2 * 655_360), rel=0.01)
    assert four.prefill_tokens_per_second == pytest.approx(4 * one.prefill_tokens_per_second)


def test_the_rates_of_a_job_come_from_the_models_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152, "num_attention_heads": 9}
    shape |= {"num_key_value_heads": 3, "intermediate_size": 1536, "tie_word_embeddings": True}
    model = ModelSpec(id=str(tmp_path))
    for devices in ("", "0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
        found = []
        for layers in (30, 300):
            (tmp_path / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": layers}))
            found.append(default_rates(model, ExecutionSpec()).kv_tokens_per_second)
        assert found[0] == pytest.approx(10 * found[1])


def test_a_model_without_a_readable_configuration_has_the_rates_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert default_rates(ModelSpec(id=str(tmp_path)), ExecutionSpec()) == gpu_rates(None)
