"""The plugin that makes vLLM a BatchLLM engine; importing it loads the standard library only.

An engine gets our scheduler by the `scheduler_cls` it is given (`scheduler_path`). vLLM calls `register` in each of its
processes (entry point `vllm.general_plugins`); it does nothing unless `BATCHLLM_ATTENTION` asks for our attention, as
`attention_choice` sets it while an engine starts, or `BATCHLLM_LOAD_PHASES` for the phases of that start.
"""

from __future__ import annotations

import os

PLUGIN = "batchllm"
"""Our name among vLLM's plugins, as `VLLM_PLUGINS` would list it."""

ATTENTION_VARIABLE = "BATCHLLM_ATTENTION"
"""Environment variable with the stock backend below prefix-shared attention; with it, vLLM's
`attention_backend="CUSTOM"` is ours. It carries the choice from `attention_choice` to all processes of an engine."""

STOCK_BACKENDS = {
    "FLASH_ATTN": f"{__name__}.shared_flash_attn.SharedBackend",
    "TRITON_ATTN": f"{__name__}.shared_triton_attn.SharedBackend",
}
"""vLLM's backends that prefix sharing is built upon, each with the class on top of it."""

_SCHEDULERS = "batchllm_kernels.vllm_plugin.scheduler"


def register() -> None:
    """Register the attention backend, and watch the start, where the environment asks; may be called more than once.

    Raises:
        ValueError: the environment names another stock backend.
    """
    from batchllm_kernels.vllm_plugin.load_phases import watch_loading

    watch_loading()
    stock = os.environ.get(ATTENTION_VARIABLE)
    if stock:
        from batchllm_kernels.vllm_plugin import attention_backend

        attention_backend.register(stock)


def scheduler_path(*, async_scheduling: bool) -> str:
    """Value of vLLM's `scheduler_cls` for our scheduler.

    Args:
        async_scheduling: as vLLM resolved it for the engine.
    """
    return f"{_SCHEDULERS}.{'AsyncBatchLLMScheduler' if async_scheduling else 'BatchLLMScheduler'}"
