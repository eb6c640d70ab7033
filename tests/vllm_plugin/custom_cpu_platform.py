"""vLLM's CPU platform, except that it takes the backend `CUSTOM` under the same conditions as that of CUDA does.

With it, an engine on a CPU goes through all that an engine on a GPU does to get prefix-shared attention, with compiled
pieces that are captured as CUDA graphs are, if wanted.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum


class CustomCpuPlatform(CpuPlatform):
    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: AttentionBackendEnum | None, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is not AttentionBackendEnum.CUSTOM:
            found: str = super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
            return found
        reasons = AttentionBackendEnum.CUSTOM.get_class().validate_configuration(
            device_capability=DeviceCapability(9, 0), **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(f"Selected backend {selected_backend} is not valid for this configuration: {reasons}")
        return AttentionBackendEnum.CUSTOM.get_path()


class CapturingCpuPlatform(CustomCpuPlatform):
    """As on CUDA, decode steps are captured whole, and so are the pieces between the attention layers of a model."""

    @classmethod
    def support_static_graph_mode(cls) -> bool:
        return True

    @classmethod
    def get_static_graph_wrapper_cls(cls) -> str:
        return "tests.vllm_plugin.replayed_piece.ReplayedPiece"

    @classmethod
    def graph_pool_handle(cls) -> Any:
        return None

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        from vllm.config import CompilationMode  # imports the platform

        compilation = vllm_config.compilation_config
        mode, sizes = compilation.mode, compilation.cudagraph_capture_sizes
        super().check_and_update_config(vllm_config)
        if mode == CompilationMode.VLLM_COMPILE:
            compilation.mode, compilation.cudagraph_capture_sizes = mode, sizes
            compilation.backend = "eager"
        vllm_config.parallel_config.worker_cls = "tests.vllm_plugin.capturing_worker.CapturingWorker"
