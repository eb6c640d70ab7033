"""Chooses the dtype that an engine on a CPU computes in: one that is fast on this processor, and fits its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchllm_operators.errors import TerminalError
from batchllm_operators.machine.processor import Processor
from batchllm_operators.models.model_shape import is_quantised, model_shape, stored_parameters
from batchllm_operators.specs.execution import ModelSpec

SLOWER = "5 to 8 times slower than float32"
"""Half precision without instructions for it, as measured on AMD Zen 3; benchmarks/results/cpu_dtype.md has another."""

GIB = 1024**3
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """The dtype of an engine."""

    dtype: str
    """The value for vLLM's `EngineArgs`; `auto` leaves the choice to vLLM."""
    reason: str | None = None
    """Who chose it and why, where it was not vLLM."""
    warning: str | None = None
    """What to know of an explicit choice that is slow here."""


def is_slow(dtype: str, processor: Processor) -> bool:
    """Whether it is a half precision that this processor is known to emulate."""
    fast = {"bfloat16": processor.fast_bf16, "float16": processor.fast_fp16}
    return fast.get(dtype) is False


def choose_dtype(model: ModelSpec, processor: Processor, config: Mapping[str, Any]) -> DtypeChoice:
    """The dtype of a model on a CPU.

    `auto` is bfloat16 where the processor multiplies it in hardware, else float32; for quantised weights, and on
    processors of which nothing is known, it stays vLLM's own choice. What the job names is never replaced.

    Args:
        model: the model part of the job.
        processor: what the CPU is fast at.
        config: the model's `config.json`.
    """
    if model.dtype != "auto":
        told = f"the job (model.dtype: {model.dtype})"
        if not is_slow(model.dtype, processor):
            return DtypeChoice(model.dtype, told)
        why = processor.reason if model.dtype == "bfloat16" else "the processor has no instructions for it"
        warning = f"model.dtype: {model.dtype} is {SLOWER} here: {why}; set auto or float32"
        return DtypeChoice(model.dtype, f"{told}; {SLOWER} here: {why}", warning)
    if is_quantised(config):
        return DtypeChoice("auto", "model.dtype auto: vLLM's choice for quantised weights")
    if processor.fast_bf16 is None:
        return DtypeChoice("auto", f"model.dtype auto: vLLM's choice, because {processor.reason}")
    if processor.fast_bf16:
        return DtypeChoice("bfloat16", f"model.dtype auto: {processor.reason}")
    return DtypeChoice("float32", f"model.dtype auto: bfloat16 is {SLOWER} here, because {processor.reason}")


def check_memory(model: ModelSpec, dtype: str, config: Mapping[str, Any], *, free_bytes: int) -> None:
    """Refuse float32 weights that do not fit, before the operating system ends the engine over them.

    Most models are stored in 16 bits, so that float32 takes twice the memory that their files suggest.

    Args:
        model: the model part of the job.
        dtype: as `choose_dtype` chose it.
        config: the model's `config.json`; where it tells no size, nothing is checked.
        free_bytes: what is left for the weights.

    Raises:
        TerminalError: with the memory that they need, the memory there is, and what to set.
    """
    if dtype != "float32" or is_quantised(config):
        return
    shape = model_shape(config)
    parameters = stored_parameters(model, config) or (shape.parameters if shape else 0)
    needed = _FLOAT32_BYTES * parameters
    if needed > free_bytes:
        raise TerminalError(
            f"model.dtype: {model.dtype} is float32 here, which needs {needed / GIB:.1f} GiB for the weights of "
            f"{model.id!r}, expected at most the {free_bytes / GIB:.1f} GiB that are free beside the KV cache; "
            f"bfloat16 needs half and is {SLOWER} on a processor without instructions for it"
        )
