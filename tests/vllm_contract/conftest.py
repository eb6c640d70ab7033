from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest


@pytest.fixture(scope="session")
def vllm() -> Any:
    """vLLM with all that its engine imports; the test is skipped where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's and torch's own, while they are imported
        vllm = pytest.importorskip("vllm")
        importlib.import_module("vllm.v1.engine.llm_engine")  # what we use of it imports all the rest
        return vllm
