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

from batchllm_kernels.attention.cost import ModelHeads
from batchllm_kernels.bench.byte_model import model_step
from batchllm_kernels.bench.workloads import SharingRequest, decode_step, groups, workload_steps

HEADS = ModelHeads(heads=32, kv_heads=8, head_size=128)


def bench(*arguments: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)} if cache else None
    command = [sys.executable, "-m", "batchllm_kernels.bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("number_of_groups", [1, 2, 16])
def test_the_papers_shape_reads_at_most_1_15_times_the_minimum(number_of_groups: int) -> None:
    step = decode_step("paper", groups(number_of_groups, prefix=2000, own=200, degree=16), 16)
    assert model_step(step, HEADS).read_to_minimum <= 1.15


def test_the_report_has_every_workload_and_never_expects_a_loss() -> None:
    report = json.loads(bench("--model", "--json").stdout)
    workloads = [step.name for step in workload_steps(16)]
    assert [row["workload"] for row in report["rows"][: len(workloads)]] == workloads
    assert all(row["gate"].startswith("stock") for row in report["rows"] if row["speedup_with_l2"] < 1)
    paper = next(row for row in report["rows"] if row["workload"].startswith("one group of the paper"))
    assert paper["read_to_minimum"] <= 1.15


def test_workloads_without_sharing_stay_on_the_stock_path() -> None:
    steps = {step.name: model_step(step, HEADS) for step in workload_steps(16)}
    for name in ("no sharing", "ragged output, no sharing"):
        assert steps[name].gate == "stock: nothing worth sharing"
        assert steps[name].read_to_minimum == 1


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
SHARED_MEMORY_BYTES = {"sm80": 163 * 1024, "sm90": 227 * 1024}  # of a program


def test_kernels_compile_for_ampere_and_hopper_without_spilling(tmp_path: Path) -> None:
    done = bench("--compile", "--quick", "--json", cache=tmp_path)
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    assert {(row["architecture"], row["head_size"]) for row in rows} == {
        (architecture, size) for architecture in ("sm80", "sm90") for size in (64, 128, 256)
    }
    for row in rows:
        assert row["stack_bytes"] <= MAX_STACK_BYTES, row
        assert 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= SHARED_MEMORY_BYTES[row["architecture"]], row
