from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        # vLLM 0.32 on a CPU does not start in a process that has loaded numba.
        ("batchllm_operators.execute.backends.local_worker", ["prefect", "vllm", "torch", "transformers", "numba"]),
        ("batchllm_operators.execute.fleet", ["prefect", "vllm", "torch", "transformers"]),
        ("batchllm_operators.execute.task", ["vllm", "torch", "transformers"]),
    ],
)
def test_a_module_loads_none_of_the_heavy_packages_it_does_not_need(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print(*sorted(set({absent!r}) & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
