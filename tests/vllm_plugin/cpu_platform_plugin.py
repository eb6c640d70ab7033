"""What vLLM calls to find `CustomCpuPlatform`; see `custom_cpu_platform.py`. Imports nothing of vLLM."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

from batchllm_kernels.vllm_plugin import STOCK_BACKENDS

REPLAYS_VARIABLE = "TEST_REPLAYED_PIECES"
"""Environment variable with the file for a JSON line on every capture and replay; unset: nothing is compiled."""


def platform() -> str:
    """Let prefix sharing be built upon vLLM's backend of CPUs, and name the platform that takes it."""
    STOCK_BACKENDS["CPU_ATTN"] = "tests.vllm_plugin.plain_cpu_backend.SharedOverCpu"
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        _let_triton_be_interpreted()
    name = "CapturingCpuPlatform" if REPLAYS_VARIABLE in os.environ else "CustomCpuPlatform"
    return f"tests.vllm_plugin.custom_cpu_platform.{name}"


def _let_triton_be_interpreted() -> None:
    """vLLM takes Triton on a CPU where Triton has a backend for it; with `TRITON_INTERPRET` it needs none."""
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


def announce(folder: Path) -> None:
    """Make a folder that announces the platform to every process which has it in its `PYTHONPATH`."""
    metadata = folder / "custom_cpu_platform-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: custom-cpu-platform\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.platform_plugins]\ncustom_cpu = {__name__}:platform\n")
