"""What vLLM calls to find `CustomCpuPlatform`; see `custom_cpu_platform.py`. Imports nothing of vLLM."""

from __future__ import annotations

from pathlib import Path

from batchllm_kernels.vllm_plugin import STOCK_BACKENDS


def platform() -> str:
    """Let prefix sharing be built upon vLLM's backend of CPUs, and name the platform that takes it."""
    STOCK_BACKENDS["CPU_ATTN"] = "tests.vllm_plugin.plain_cpu_backend.SharedOverCpu"
    return "tests.vllm_plugin.custom_cpu_platform.CustomCpuPlatform"


def announce(folder: Path) -> None:
    """Make a folder that announces the platform to every process which has it in its `PYTHONPATH`."""
    metadata = folder / "custom_cpu_platform-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: custom-cpu-platform\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.platform_plugins]\ncustom_cpu = {__name__}:platform\n")
