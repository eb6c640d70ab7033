"""The benchmark: its byte counts, its refusal to time a wrong result, and what it prints without a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from batchllm_kernels.bench.__main__ import QUICK_HEAD_SIZES
from batchllm_kernels.bench.workloads import SharingRequest, decode_step


def bench(*arguments: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)} if cache else None
    command = [sys.executable, "-m", "batchllm_kernels.bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_host_time_of_a_plan_is_reported_for_every_way_of_sharing() -> None:
    rows = json.loads(bench("--plan", "--json").stdout)["rows"]
    assert len(rows) == 5
    assert all(row["requests"] == 1024 and row["blocks_per_request"] == 256 for row in rows)
    assert all(0 < row["minimum_ms"] <= row["median_ms"] for row in rows)


def test_the_host_time_of_a_layer_and_of_a_step_is_reported_without_a_device() -> None:
    report = json.loads(bench("--host", "--json").stdout)
    times = {row["what"]: row["microseconds"] for row in report["rows"]}
    assert {"a layer, without launches", "a step, plan", "a step, load"} <= set(times)
    assert min(times.values()) > 0


def test_only_whole_blocks_of_a_prefix_are_shared() -> None:
    step = decode_step("two", [SharingRequest((("p", 40),), 5), SharingRequest((("p", 40),), 9)], 16)
    assert step.block_table.tolist() == [[1, 2, 3, 0], [1, 2, 4, 5]]
    assert step.unique_kv_tokens == 32 + (45 - 32) + (49 - 32)


def test_figures_without_a_device_are_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    for mode in (["--device", "cuda"], ["--calibrate"], ["--tune"], ["--check"], ["--replay"]):
        done = bench(*mode, "--json")
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr == "device: expected a CUDA device, got none\n"


def test_the_benchmark_needs_torch_and_triton_only() -> None:
    code = (
        "import sys; from batchllm_kernels.bench import __main__, byte_model, host_time, stages; "
        "print([m for m in ('vllm', 'prefect', 'pydantic', 'pyarrow', 'numba', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


MAX_STACK_BYTES = 16  # a few spilled registers outside the inner loop
STACK_BYTES_OF_HIGH_TILES = 512
"""Of the tile of 128 rows by four warps, which spills and is still the fastest that was measured on an H100."""
SHARED_MEMORY_BYTES = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}  # of a program


def test_kernels_compile_for_three_architectures_hardly_spilling(tmp_path: Path) -> None:
    done = bench("--compile", "--quick", "--json", cache=tmp_path)
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    assert {(row["architecture"], row["head_size"]) for row in rows} == {
        (architecture, size) for architecture, sizes in QUICK_HEAD_SIZES.items() for size in sizes
    }
    for row in rows:
        high = (row["kernel"], row["architecture"], row["head_size"]) == ("attend_shared_kernel", "sm90", 128)
        assert row["stack_bytes"] <= (STACK_BYTES_OF_HIGH_TILES if high else MAX_STACK_BYTES), row
        assert 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= SHARED_MEMORY_BYTES[row["architecture"]], row
