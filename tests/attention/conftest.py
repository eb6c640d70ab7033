"""Kernels run on the CUDA device where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

# only while the kernels are made and run: nothing else in this process or its children is to be interpreted
INTERPRET = {"name": "TRITON_INTERPRET", "value": "1"}

if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(**INTERPRET)
        import_module("batchllm_kernels.attention.launch")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are so small here that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels of a test run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    monkeypatch.setenv(**INTERPRET)
    return torch.device("cpu")
