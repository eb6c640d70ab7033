import subprocess
import sys

import pytest

HEAVY = ("torch", "vllm", "triton", "prefect", "transformers", "pyarrow", "numba")


@pytest.mark.parametrize("module", ["batchllm_flows", "batchllm_operators", "batchllm_kernels"])
def test_importing_the_package_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "[]"


def test_the_flow_module_loads_no_engine() -> None:
    program = "import sys, batchllm_flows.flows; print([n for n in ('torch', 'vllm', 'triton') if n in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "[]"


def test_public_names_are_loaded_on_first_use() -> None:
    import batchllm_flows

    assert batchllm_flows.BatchJob.__name__ == "BatchJob"
    with pytest.raises(AttributeError, match="public names"):
        batchllm_flows.Missing  # noqa: B018
