"""vLLM's CPU platform, except that it takes the backend `CUSTOM` under the same conditions as that of CUDA does.

With it, an engine on a CPU goes through all that an engine on a GPU does to get prefix-shared attention.
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
