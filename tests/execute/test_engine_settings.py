"""The settings of a loaded engine say who chose its attention, and why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from batchllm_operators.execute.engine_settings import engine_settings
from batchllm_operators.specs.execution import ModelSpec

CONFIG = SimpleNamespace(
    scheduler_config=SimpleNamespace(
        scheduler_cls=None, max_num_seqs=16, max_num_batched_tokens=2048, async_scheduling=True
    ),
    cache_config=SimpleNamespace(block_size=16, num_gpu_blocks=512),
    model_config=SimpleNamespace(dtype="torch.bfloat16"),
    compilation_config=SimpleNamespace(
        cudagraph_mode=SimpleNamespace(name="FULL_AND_PIECEWISE"), max_cudagraph_capture_size=16
    ),
    parallel_config=SimpleNamespace(tensor_parallel_size=1),
    device_config=SimpleNamespace(device_type="cuda"),
)


class Choice(SimpleNamespace):
    def __str__(self) -> str:
        return "stock (FLASH_ATTN)"


@pytest.mark.parametrize(
    ("attention", "given", "reasons", "told"),
    [
        ("stock", "auto; the plan expects no gain", (), "auto; the plan expects no gain"),
        ("stock", None, (), "model.attention: stock"),
        ("auto", None, ("no MLA",), "model.attention: auto; prefix-shared attention not supported: no MLA"),
    ],
)  # fmt: skip
def test_the_reason_of_the_attention_is_that_of_the_plan_the_job_or_the_device(
    attention: Any, given: str | None, reasons: tuple[str, ...], told: str
) -> None:
    choice: Any = Choice(reasons=reasons)
    model = ModelSpec(id="m", attention=attention)
    settings = {one.name: one for one in engine_settings(CONFIG, model, choice, attention_reason=given)}
    assert (settings["attention"].value, settings["attention"].reason) == ("stock (FLASH_ATTN)", told)
