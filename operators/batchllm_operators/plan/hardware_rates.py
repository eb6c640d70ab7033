"""Rates of an engine where nothing has been measured: two reference points, scaled by model, dtype and processor.

A guess to within a few times, for the first plan of a job; a calibration or the job's own `planning.cost` goes before
it. What scales with what:

- computing a token (prefill and decode beyond the step): with the active parameters and the speed of the arithmetic;
- a step that does nothing, which reads the weights: with the bytes of all parameters and the speed of the memory;
- reading a KV token: with its bytes and the speed of the memory;
- tokens that the KV cache holds: with its memory and the bytes of a token.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from batchllm_operators.cost import CPU_DEFAULT, GPU_DEFAULT
from batchllm_operators.machine.devices import gpus_of_machine
from batchllm_operators.machine.processor import Processor, processor
from batchllm_operators.models.dtype_choice import choose_dtype, is_slow
from batchllm_operators.models.model_shape import ModelShape, model_shape, read_model_config
from batchllm_operators.specs.execution import ExecutionSpec, ModelSpec
from batchllm_operators.specs.planning import CostModel

CPU_REFERENCE = ModelShape(parameters=134_479_872, active_parameters=134_479_872, kv_values=11_520)
CPU_REFERENCE_CORES = 2
"""The model of `CPU_DEFAULT`: SmolLM2-135M in bfloat16 on two cores with AVX512-BF16."""

GPU_REFERENCE = ModelShape(parameters=8_030_000_000, active_parameters=7_500_000_000, kv_values=65_536)
"""The model of `GPU_DEFAULT`: Llama 3 8B in bfloat16."""

GPU_USABLE_BYTES = 68_500_000_000
"""What a GPU of 80 GB has for weights and KV cache."""

FLOAT32_SPEED = {True: 0.3, False: 0.1}
"""Arithmetic in float32 with and without AVX-512, over bfloat16 in hardware. The processor of the reference reaches
more (benchmarks/results/cpu_dtype.md); those without bfloat16 are older and slower."""

EMULATED_SPEED = 1 / 6
"""Half precision without instructions for it, over float32: a sixth, between the fifth and the eighth of Zen 3."""

FASTEST_MEMORY = 8.0
"""Memory of a socket, over what two cores draw: more cores than sixteen wait for it."""

_BFLOAT16_BYTES = 2
_FEWEST_KV_TOKENS = 10_000


@dataclass(frozen=True, slots=True)
class Speed:
    """One engine's share of the machine, over the reference."""

    arithmetic: float
    memory: float


def default_rates(model: ModelSpec, execution: ExecutionSpec) -> CostModel:
    """Rates of one engine of a job on this machine, by what is known before it is started.

    Args:
        model: the model part of the job; its configuration is read, its weights are not.
        execution: how many engines share the machine, and with how many GPUs each.
    """
    config = read_model_config(model)
    shape = model_shape(config)
    if gpus_of_machine():
        return gpu_rates(shape, gpus=execution.gpus_per_engine)
    cpu = processor()
    cores = len(os.sched_getaffinity(0)) / execution.engines
    return cpu_rates(shape, cpu, cores=max(cores, 1.0), dtype=choose_dtype(model, cpu, config).dtype)


def gpu_rates(shape: ModelShape | None, *, gpus: int = 1) -> CostModel:
    """Rates of an engine on GPUs of 80 GB, which share the work evenly.

    Args:
        shape: of the model; None: as the reference.
        gpus: GPUs of the engine.
    """
    model = shape or GPU_REFERENCE
    kv_bytes = _BFLOAT16_BYTES * model.kv_values
    free = gpus * GPU_USABLE_BYTES - _BFLOAT16_BYTES * model.parameters
    scaled = _scaled(GPU_DEFAULT, GPU_REFERENCE, model, Speed(gpus, gpus))
    return scaled.model_copy(update={"kv_capacity_tokens": max(round(free / kv_bytes), _FEWEST_KV_TOKENS)})


def cpu_rates(shape: ModelShape | None, cpu: Processor, *, cores: float, dtype: str) -> CostModel:
    """Rates of an engine on some cores of a CPU.

    Args:
        shape: of the model; None: as the reference.
        cpu: what it is fast at.
        cores: of this engine.
        dtype: it computes in; `auto` counts as bfloat16.
    """
    model = shape or CPU_REFERENCE
    share = cores / CPU_REFERENCE_CORES
    arithmetic, width = share, 1.0
    if dtype == "float32":
        arithmetic, width = share * FLOAT32_SPEED[cpu.avx512], 2.0
    elif is_slow(dtype, cpu):
        arithmetic = share * FLOAT32_SPEED[cpu.avx512] * EMULATED_SPEED
    scaled = _scaled(CPU_DEFAULT, CPU_REFERENCE, model, Speed(arithmetic, min(share, FASTEST_MEMORY) / width))
    capacity = CPU_DEFAULT.kv_capacity_tokens * CPU_REFERENCE.kv_values / (model.kv_values * width)
    return scaled.model_copy(update={"kv_capacity_tokens": max(round(capacity), 1)})


def _scaled(known: CostModel, reference: ModelShape, model: ModelShape, speed: Speed) -> CostModel:
    compute = speed.arithmetic * reference.active_parameters / model.active_parameters
    return known.model_copy(
        update={
            "step_seconds": known.step_seconds * model.parameters / reference.parameters / speed.memory,
            "prefill_tokens_per_second": known.prefill_tokens_per_second * compute,
            "decode_tokens_per_second": known.decode_tokens_per_second * compute,
            "kv_tokens_per_second": known.kv_tokens_per_second * speed.memory * reference.kv_values / model.kv_values,
        }
    )
