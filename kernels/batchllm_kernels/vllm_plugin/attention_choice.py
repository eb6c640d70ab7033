"""Starts an engine with prefix-shared attention or with vLLM's own, and says which it is and why.

What vLLM would choose, and whether prefix sharing fits on top of it, are vLLM's own answers (`get_attn_backend`, as
its layers ask). Some features of layers show only when a model is built, in whatever process builds it: then the engine
does not start, and the reason comes back as a refusal (`attention_refusals`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

from vllm import envs, platforms
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_backend

from batchllm_kernels.attention.flash_shared import SharedImplementationChoice
from batchllm_kernels.vllm_plugin import ATTENTION_VARIABLE, PLUGIN, STOCK_BACKENDS
from batchllm_kernels.vllm_plugin.attention_refusals import REFUSALS_VARIABLE, recorded
from batchllm_kernels.vllm_plugin.flash_attention_3 import shared_implementation

Requested = Literal["auto", "shared", "stock"]

WHOLE_MIXED_STEPS = (
    "cudagraph_mode FULL (steps with prompts captured whole; FULL_AND_PIECEWISE captures whole decode steps)"
)

_LOGGER = logging.getLogger(__name__)
_Engine = TypeVar("_Engine")


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The attention of an engine."""

    shared: bool
    stock: str | None
    """vLLM's name of its own backend; None where vLLM names none before the model is built."""
    reasons: tuple[str, ...] = ()
    """Why it is not shared, where it was to be; or why `stock` is None."""
    shared_parts: SharedImplementationChoice | None = None
    """What runs the shared parts of steps, and why; None where it is not shared."""

    def __str__(self) -> str:
        if self.shared:
            flash = self.shared_parts is not None and self.shared_parts.implementation == "flash_attention_3"
            return f"shared over {self.stock}{', shared parts by FlashAttention 3' if flash else ''}"
        return f"stock ({self.stock})" if self.stock else "stock"


class UnsupportedAttentionError(ValueError):
    """Prefix-shared attention was asked for and is not to be had; its text gives all reasons that are known."""


def start_with_attention(
    requested: Requested, make_config: Callable[[], Any], start: Callable[[Any], _Engine]
) -> tuple[_Engine, AttentionChoice]:
    """Start an engine with the attention that is asked for.

    Args:
        requested: `stock`, vLLM's own; `shared`, ours or nothing; `auto`, ours where it is supported, else vLLM's own
            with a warning in the log.
        make_config: makes vLLM's finished `VllmConfig`; called a second time where a model refused ours while it was
            built.
        start: makes the engine of a config; all processes of the engine must have been started when it returns.

    Raises:
        UnsupportedAttentionError: `shared` is asked for and not supported.
        Exception: whatever `make_config` and `start` raise.
    """
    config = make_config()
    stock, unknown = _stock_backend(config)
    if requested == "stock":
        return start(config), AttentionChoice(shared=False, stock=stock, reasons=unknown)
    reasons = tuple(_unsupported(config, stock, unknown))
    if stock and not reasons:
        config.attention_config.backend = AttentionBackendEnum.CUSTOM
        # As each of the engine's workers would do by itself, so that the config tells what they do.
        config.compilation_config.resolve_cudagraph_mode_and_sizes(
            AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE,
            AttentionBackendEnum.CUSTOM.name,
            use_v2_model_runner=config.use_v2_model_runner,
        )
        with _registered(stock) as refusals:
            try:
                parts = shared_implementation(config.model_config.dtype, config.model_config.get_head_size())
                return start(config), AttentionChoice(shared=True, stock=stock, shared_parts=parts)
            except Exception as error:
                reasons = recorded(refusals)
                if not reasons:
                    raise
                if requested == "shared":
                    raise UnsupportedAttentionError("; ".join(reasons)) from error
        config = make_config()
    if requested == "shared":
        raise UnsupportedAttentionError("; ".join(reasons))
    choice = AttentionChoice(shared=False, stock=stock, reasons=reasons)
    _LOGGER.warning("attention: %s, because prefix-shared attention is not supported: %s", choice, "; ".join(reasons))
    return start(config), choice


def _stock_backend(config: Any) -> tuple[str | None, tuple[str, ...]]:
    """Name of the backend that vLLM takes by itself, or why it names none."""
    try:
        return _backend_of_layers(config).get_name(), ()
    except Exception as error:  # whatever it is, it is told; a model's layers may choose by themselves
        return None, (f"vLLM names no attention backend for the model: {_one_line(error)}",)


def _unsupported(config: Any, stock: str | None, unknown: tuple[str, ...]) -> Iterator[str]:
    """Why prefix sharing does not fit, as far as it can be known before the model is built."""
    attention, model = config.attention_config, config.model_config
    if attention.backend is not None or attention.backend_per_kind:
        given = attention.backend.name if attention.backend else dict(attention.backend_per_kind)
        yield f"vLLM's attention backend: expected to be left to vLLM, got {given}"
        return
    if stock is None:
        yield from unknown
        return
    if AttentionBackendEnum.CUSTOM.is_overridden():
        yield f"vLLM's attention backend CUSTOM: expected to be free, got {AttentionBackendEnum.CUSTOM.get_path()}"
        return
    if envs.VLLM_PLUGINS is not None and PLUGIN not in envs.VLLM_PLUGINS:
        yield f"VLLM_PLUGINS: expected {PLUGIN!r} among them, got {','.join(envs.VLLM_PLUGINS)!r}"
    for name, present in (
        ("MLA", model.use_mla),
        ("alibi", model.uses_alibi),
        ("logits soft cap", bool(getattr(model.hf_text_config, "attn_logit_softcapping", None))),
        ("chunked local attention", bool(model.attention_chunk_size)),
        ("speculative decoding", config.speculative_config is not None),
        ("a model without attention", model.is_attention_free),
        (WHOLE_MIXED_STEPS, config.compilation_config.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL),
    ):
        if present:
            yield f"{name} not supported"
    if stock not in STOCK_BACKENDS:
        device = platforms.current_platform.device_name
        yield f"vLLM's own attention backend on {device}: expected {' or '.join(STOCK_BACKENDS)}, got {stock}"
        return
    yield from _refused_by_vllm(config, stock)


def _refused_by_vllm(config: Any, stock: str) -> tuple[str, ...]:
    """vLLM's reasons not to take prefix-shared attention over a stock backend for the model's layers."""
    from batchllm_kernels.vllm_plugin.attention_backend import SharedAttentionBackend

    attention = config.attention_config
    attention.backend = AttentionBackendEnum.CUSTOM
    try:
        with _registered(stock) as refusals:
            try:
                chosen = _backend_of_layers(config)
            except ValueError as error:
                return recorded(refusals) or (_one_line(error),)
    finally:
        attention.backend = None
    if issubclass(chosen, SharedAttentionBackend):
        return ()
    return (f"vLLM on {platforms.current_platform.device_name}: expected it to take CUSTOM, got {chosen.get_name()}",)


def _backend_of_layers(config: Any) -> Any:
    """The backend class that vLLM gives to layers as they stand in the model's configuration."""
    model = config.model_config
    layer_types = getattr(model.hf_text_config, "layer_types", None)
    sliding = model.get_sliding_window() is not None
    if layer_types is not None:  # they say which layers use the window, if any does
        sliding = sliding and any("sliding" in one for one in layer_types)
    with set_current_vllm_config(config):
        return get_attn_backend(
            model.get_head_size(),
            model.dtype,
            config.cache_config.cache_dtype,
            use_mla=model.use_mla,
            use_mm_prefix=model.is_mm_prefix_lm,
            has_sliding_window=sliding,
        )


@contextmanager
def _registered(stock: str) -> Iterator[Path]:
    """vLLM's `CUSTOM` is prefix-shared attention, in this process and in those that it starts meanwhile.

    Args:
        stock: vLLM's name of the backend below.

    Yields:
        The file in which refusals are recorded.
    """
    from batchllm_kernels.vllm_plugin import attention_backend

    with TemporaryDirectory(prefix="batchllm-attention-") as folder:
        refusals = Path(folder) / "refusals.jsonl"
        variables = {ATTENTION_VARIABLE: stock, REFUSALS_VARIABLE: str(refusals)}
        os.environ.update(variables)
        # This process has loaded its plugins before, and so has every process that is forked from it.
        attention_backend.register(stock)
        try:
            yield refusals
        finally:
            AttentionBackendEnum.CUSTOM.clear_override()
            for name in variables:
                del os.environ[name]


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
