"""What the tests of the plugin share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's and torch's own, while they are imported
    pytest.importorskip("vllm")
    import vllm.v1.engine.llm_engine  # noqa: F401  # what the tests use of it imports all the rest

from tests.vllm_plugin.driven_scheduler import DrivenScheduler, Limits, engine_config

MakeScheduler = Callable[[Limits, "dict[str, Any] | None"], DrivenScheduler]


@pytest.fixture(scope="session")
def drive(tiny_llama: str) -> MakeScheduler:
    """Make a driven scheduler: ours with these options, or vLLM's own for None."""

    @cache
    def config(asynchronous: bool) -> Any:
        return engine_config(tiny_llama, asynchronous=asynchronous)

    def make(limits: Limits, options: dict[str, Any] | None) -> DrivenScheduler:
        return DrivenScheduler(config(limits.asynchronous), limits, options)

    return make
