"""Inputs that are awkward to plan, each planned without special pleading."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from batchllm_operators.plan.markdown import plan_markdown
from batchllm_operators.plan.planning import plan_requests
from batchllm_operators.records import PlanSummary
from batchllm_operators.specs.planning import PlanningSpec
from batchllm_operators.store import Store
from tests.plan.staged_jobs import ideal_computed_tokens, planned_rows, stage_prompts

BLOCK = 4

AWKWARD: dict[str, list[list[int]]] = {
    "one request": [[1, 2, 3]],
    "requests shorter than a block": [[number] for number in range(5)] + [[1, number] for number in range(5)],
    "empty prompts": [[], [1] * 9, []],
    "all requests equal": [[1] * 50] * 20,
    "no two equal": [[number] * 50 for number in range(20)],
    "one group with everything": [[1] * 40 + [number] for number in range(50)],
    "prompts at the length of the model": [[1] * 4095 + [number] for number in range(4)],
    "groups of one and many requests": [[number, number + 1] * 8 for number in range(2000)],
    "every prompt a beginning of the next": [[1] * length for length in range(1, 60)],
    "prompts that end where others go on": [[1] * 8, [1] * 8 + [2], [1] * 8 + [3] * 9, [1] * 12],
    "the smallest and the largest token ids": [[0, 2**31 - 1] * 6 + [number] for number in range(3)],
}


@pytest.mark.parametrize("order", ["decode_first", "blend", "input"])
@pytest.mark.parametrize("prompts", AWKWARD.values(), ids=AWKWARD.keys())
def test_awkward_prompts_are_planned_whole(tmp_path: Path, prompts: list[list[int]], order: str) -> None:
    plan, rows = plan_of(tmp_path, prompts, order=order)
    planned = [row["prompt_token_ids"] for row in rows]
    assert sorted(planned) == sorted(map(list, {tuple(prompt) for prompt in prompts}))
    assert plan.forecast.computed_prompt_tokens == ideal_computed_tokens(planned, BLOCK)
    assert 0 <= plan.saving.single_level <= plan.saving.optimum <= 1
    if order != "input":
        assert plan.saving.planned == pytest.approx(plan.saving.optimum)
    assert plan_markdown(plan).startswith("## Plan")


@pytest.mark.parametrize("prompts", AWKWARD.values(), ids=AWKWARD.keys())
def test_awkward_prompts_are_dealt_to_many_workers(tmp_path: Path, prompts: list[list[int]]) -> None:
    plan, rows = plan_of(tmp_path, prompts, engines=7)
    assert len(rows) == plan.counts.requests
    assert len(plan.bundles) >= min(7, plan.counts.requests) // 2
    assert plan.shape.split_prefix_tokens >= 0


@pytest.mark.parametrize("estimate", [-(2**31), -1, 0, 1, 2**31 - 1])
def test_negative_and_absurd_estimates_stay_within_one_and_max_tokens(tmp_path: Path, estimate: int) -> None:
    _, rows = plan_of(tmp_path, [[1] * 9, [2] * 9], estimates=[estimate, None])
    assert all(1 <= row["expected_output_tokens"] <= row["max_tokens"] for row in rows)


def plan_of(
    folder: Path,
    prompts: list[list[int]],
    *,
    order: str = "decode_first",
    engines: int = 1,
    estimates: Sequence[int | None] | None = None,
) -> tuple[PlanSummary, list[dict[str, object]]]:
    work = Store(str(folder))
    planning = PlanningSpec.model_validate({"block_size": BLOCK, "order": order})
    plan = plan_requests(work, stage_prompts(work, prompts, estimates=estimates), planning, engines=engines)
    return plan, planned_rows(work, plan)
