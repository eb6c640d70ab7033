"""The settings that decide an engine's throughput: what they came to, and who chose them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchllm_operators.execute.engine_options import VLLM_LARGEST_GRAPH, chooses_graphs
from batchllm_operators.models.dtype_choice import DtypeChoice
from batchllm_operators.records import EngineSetting
from batchllm_operators.specs.execution import ModelSpec

if TYPE_CHECKING:
    from batchllm_kernels.vllm_plugin.attention_choice import AttentionChoice

_VLLM = "vLLM's choice for the device"
_REASONS = {
    "scheduler_cls": "groups as planned, pinned prefixes, admission by predicted KV use",
    "block_size": "planning.block_size (auto: 16 on CUDA, 32 on CPUs): prefixes are shared in these blocks",
    "num_gpu_blocks": "what the memory for the KV cache holds",
    "tensor_parallel_size": "execution.gpus_per_engine",
}
_CPU_REASONS = {
    "max_num_seqs": f"{_VLLM}: beyond 64 requests a step hardly generates more a second (measured on 2 cores)",
    "max_num_batched_tokens": f"{_VLLM}: 256 to 4,096 differ by 7 % at most (measured on 2 cores)",
}
_GPU_REASONS = {"max_num_seqs": "ours: no limit below memory, by which requests are admitted"}
_MORE_GRAPHS = {
    "max_cudagraph_capture_size": "ours: max_num_seqs, so that decode steps of all requests are captured as CUDA "
    f"graphs; vLLM's own end is {VLLM_LARGEST_GRAPH} tokens"
}


def engine_settings(
    config: Any,
    model: ModelSpec,
    attention: AttentionChoice,
    dtype: DtypeChoice | None = None,
    attention_reason: str | None = None,
) -> tuple[EngineSetting, ...]:
    """The settings of a loaded engine.

    Args:
        config: vLLM's `VllmConfig`, as it is after the KV cache has been allocated.
        model: the model part of the job, whose `engine_args` go before every choice of ours and of vLLM.
        attention: as the engine was started with.
        dtype: as it was chosen on a CPU; None: the job or vLLM chose it.
        attention_reason: why `model.attention` is not as the job says; None: it is.
    """
    scheduler, cache = config.scheduler_config, config.cache_config
    values = {
        "scheduler_cls": scheduler.scheduler_cls,
        "block_size": cache.block_size,
        "num_gpu_blocks": cache.num_gpu_blocks,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "async_scheduling": scheduler.async_scheduling,
        "dtype": dtype_name(config),
        "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
        "max_cudagraph_capture_size": config.compilation_config.max_cudagraph_capture_size,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
    }
    reasons = _REASONS | (_CPU_REASONS if config.device_config.device_type == "cpu" else _GPU_REASONS)
    if config.device_config.device_type != "cpu" and config.scheduler_config.max_num_seqs > VLLM_LARGEST_GRAPH:
        reasons = reasons | _MORE_GRAPHS
    given = set(model.engine_args) | ({"dtype"} if model.dtype != "auto" else set())
    if chooses_graphs(model.engine_args):
        given.add("max_cudagraph_capture_size")
    reasons = reasons | dict.fromkeys(given, "the job (model)")
    warnings = {}
    if dtype is not None:
        reasons["dtype"], warnings["dtype"] = dtype.reason or _VLLM, dtype.warning
    settings = [
        EngineSetting(name=name, value=str(value), reason=reasons.get(name, _VLLM), warning=warnings.get(name))
        for name, value in values.items()
    ]
    reason = attention_reason or f"model.attention: {model.attention}"
    if attention.reasons:
        what = "" if model.attention == "stock" else "prefix-shared attention not supported: "
        reason += f"; {what}{'; '.join(attention.reasons)}"
    settings.append(EngineSetting(name="attention", value=str(attention), reason=reason))
    return tuple(settings)


def dtype_name(config: Any) -> str:
    """What the model computes in, e.g. `bfloat16`, by vLLM's `VllmConfig`."""
    return str(config.model_config.dtype).removeprefix("torch.")
