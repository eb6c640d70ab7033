"""How many tokens a KV-cache block has."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from batchllm_operators.plan.block_size import planned_block_size
from batchllm_operators.plan.planning import plan_requests
from batchllm_operators.specs.planning import PlanningSpec
from batchllm_operators.store import Store
from tests.plan.staged_jobs import stage_prompts


@pytest.mark.parametrize(
    ("given", "gpus", "tokens"),
    [({}, ["0"], 16), ({}, [], 32), ({"block_size": "auto"}, [], 32), ({"block_size": 64}, ["0"], 64)],
    ids=str,
)
def test_auto_is_16_on_gpus_and_32_on_cpus_and_a_number_is_what_it_says(
    given: dict[str, Any], gpus: list[str], tokens: int
) -> None:
    assert planned_block_size(PlanningSpec.model_validate(given), gpus) == tokens


@pytest.mark.parametrize("value", [0, 1025, 16.5, True, "32", "Auto", None], ids=str)
def test_what_is_no_size_is_refused_in_one_sentence(value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        PlanningSpec.model_validate({"block_size": value})
    (fault,) = caught.value.errors()
    assert fault["loc"] == ("block_size",)
    assert "expected 'auto' or a whole number from 1 to 1024" in fault["msg"]


@pytest.mark.parametrize(("devices", "tokens", "computed"), [("0", 16, 56 + 8), ("", 32, 56 + 24)])
def test_a_plan_is_made_for_the_devices_of_the_machine_that_makes_it(
    devices: str, tokens: int, computed: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    work = Store(str(tmp_path / "work"))
    # Two prompts of 56 tokens that share 48, which is three blocks of 16 and one of 32.
    prompts = [[*range(48), *range(first, first + 8)] for first in (100, 200)]
    plan = plan_requests(work, stage_prompts(work, prompts), PlanningSpec())
    assert plan.shape.block_size == tokens
    assert plan.forecast.computed_prompt_tokens == computed
