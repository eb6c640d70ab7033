"""What a plan expects of prefix-shared attention, and which attention the engines of a job get that leaves it to it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from batchllm_kernels.attention.cost import calibration_for
from batchllm_kernels.attention.flash_shared import TILE_ROWS
from batchllm_kernels.attention.tuning import tuning_for
from batchllm_operators.cost import GPU_DEFAULT
from batchllm_operators.plan.markdown import plan_markdown
from batchllm_operators.plan.planning import plan_requests
from batchllm_operators.plan.shared_attention import (
    SHARED_TILE_ROWS,
    EngineAttention,
    PlannedGroups,
    attention_forecast,
    engine_attention,
)
from batchllm_operators.records import AttentionForecast
from batchllm_operators.specs.execution import ExecutionSpec, ModelSpec
from batchllm_operators.specs.planning import PlanningSpec
from batchllm_operators.store import Store
from tests.plan.staged_jobs import stage_prompts

LLAMA_8B = EngineAttention(heads=32, kv_heads=8, head_size=128)
CONFIG = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128_256, "intermediate_size": 14_336,
}  # fmt: skip


def groups(number: int, *, size: int, prefix: int, own: int = 100, output: int = 200) -> PlannedGroups:
    return PlannedGroups(
        size=np.full(number, size),
        prefix_tokens=np.full(number, prefix),
        own_tokens=np.full(number, float(own)),
        output_tokens=np.full(number, float(size * output)),
    )


def forecast(planned: PlannedGroups, *, engine_seconds: float | None = None) -> AttentionForecast:
    context = planned.prefix_tokens + planned.own_tokens + planned.output_tokens / planned.size / 2
    attention = float((planned.output_tokens * context).sum()) / GPU_DEFAULT.kv_tokens_per_second
    seconds = 2 * attention if engine_seconds is None else engine_seconds
    return attention_forecast(planned, LLAMA_8B, GPU_DEFAULT, engine_seconds=seconds)


def test_a_job_of_long_prefixes_and_large_groups_gets_it() -> None:
    one = forecast(groups(200, size=16, prefix=2000))
    assert one.pays
    assert 0.3 < one.attention_saving < 0.7
    assert 0.05 < one.engine_saving < one.attention_saving
    assert one.rates == "assumed, not measured"


@pytest.mark.parametrize(
    "planned",
    [groups(3000, size=1, prefix=0), groups(1000, size=16, prefix=128, own=400), groups(0, size=1, prefix=0)],
    ids=["nothing shared", "short prefixes", "no requests"],
)
def test_a_job_that_shares_little_gets_vllms_own(planned: PlannedGroups) -> None:
    one = forecast(planned)
    assert not one.pays
    assert one.attention_saving <= 0
    assert one.engine_saving <= 0


def test_what_prefill_takes_of_the_engines_time_makes_the_gain_smaller() -> None:
    planned = groups(200, size=16, prefix=2000, output=4)
    much, little = (forecast(planned, engine_seconds=seconds) for seconds in (2.0, 1000.0))
    assert much.attention_saving == little.attention_saving
    assert much.engine_saving > little.engine_saving
    assert not little.pays


def test_larger_groups_and_longer_prefixes_save_more() -> None:
    by_size = [forecast(groups(400, size=size, prefix=2000)).attention_saving for size in (2, 4, 16, 64)]
    by_prefix = [forecast(groups(400, size=16, prefix=prefix)).attention_saving for prefix in (512, 2000, 8000)]
    assert by_size == sorted(set(by_size))
    assert by_prefix == sorted(set(by_prefix))


def test_members_that_the_cache_does_not_hold_at_once_do_not_read_together() -> None:
    planned = groups(1, size=5000, prefix=2000)
    all_at_once = attention_forecast(planned, LLAMA_8B, GPU_DEFAULT, engine_seconds=1e3)
    few = GPU_DEFAULT.model_copy(update={"kv_capacity_tokens": 2400})
    assert (
        attention_forecast(planned, LLAMA_8B, few, engine_seconds=1e3).attention_saving < all_at_once.attention_saving
    )


def test_groups_that_do_not_gain_are_read_alone_and_do_not_undo_what_others_gain() -> None:
    large = groups(200, size=16, prefix=2000)
    both = PlannedGroups(
        size=np.concatenate([large.size, np.ones(300, dtype=np.int64)]),
        prefix_tokens=np.concatenate([large.prefix_tokens, np.zeros(300, dtype=np.int64)]),
        own_tokens=np.concatenate([large.own_tokens, np.full(300, 500.0)]),
        output_tokens=np.concatenate([large.output_tokens, np.full(300, 200.0)]),
    )
    assert 0 < forecast(both).attention_saving < forecast(large).attention_saving
    assert forecast(both).pays


def test_many_unequal_groups_are_a_few_kinds_of_them() -> None:
    random = np.random.default_rng(0)
    number = 200_000
    size = random.integers(1, 200, number)
    planned = PlannedGroups(size, random.integers(0, 400, number) * 16, random.uniform(10, 900, number), size * 100.0)
    sample = PlannedGroups(
        *(column[::20] for column in (size, planned.prefix_tokens, planned.own_tokens, size * 100.0))
    )
    assert forecast(planned).attention_saving == pytest.approx(forecast(sample).attention_saving, abs=0.02)


def test_groups_are_made_of_the_requests_of_a_plan() -> None:
    made = PlannedGroups.of_requests(
        group=np.array([0, 0, 1, 0], dtype=np.int32),
        prefix_tokens=np.array([32, 32, 0, 32], dtype=np.int32),
        prompt_tokens=np.array([40, 50, 7, 60], dtype=np.int32),
        output_tokens=np.array([1, 2, 4, 8], dtype=np.int32),
    )
    assert made.size.tolist() == [3, 1]
    assert made.prefix_tokens.tolist() == [32, 0]
    assert made.own_tokens.tolist() == [18.0, 7.0]
    assert made.output_tokens.tolist() == [11.0, 4.0]


def test_a_kernel_that_gains_nothing_does_not_pay() -> None:
    planned = groups(200, size=16, prefix=2000)
    slow = replace(calibration_for(""), shared_bytes_per_second=1e11, own_bytes_per_second=1e11)
    one = attention_forecast(planned, LLAMA_8B, GPU_DEFAULT, engine_seconds=100, calibration=slow)
    assert not one.pays
    assert one.engine_saving < 0


def test_the_tile_is_that_of_the_kernels() -> None:
    assert SHARED_TILE_ROWS == TILE_ROWS == tuning_for("sm90", 128, torch.bfloat16).shared.high_tile_rows


def model_folder(folder: Path, **changes: object) -> str:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return str(folder)


def test_only_jobs_that_leave_the_choice_to_the_plan_are_asked_for_on_machines_with_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_folder(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    four = engine_attention(ModelSpec(id=path, attention="auto"), ExecutionSpec(gpus_per_engine=2))
    assert four is not None
    assert (four.heads, four.kv_heads, four.head_size, four.element_bytes) == (16, 4, 128, 2)
    for attention in ("shared", "stock"):
        assert engine_attention(ModelSpec(id=path, attention=attention), ExecutionSpec()) is None
    model_folder(tmp_path, num_attention_heads=None)
    assert engine_attention(ModelSpec(id=path, attention="auto"), ExecutionSpec()) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model_folder(tmp_path)
    assert engine_attention(ModelSpec(id=path, attention="auto"), ExecutionSpec()) is None


def prompts(*, groups: int, size: int, prefix: int) -> list[list[int]]:
    return [[group] * prefix + [1000 + member, group] for group in range(groups) for member in range(size)]


def test_the_plan_says_what_it_expects_and_which_attention_the_engines_get(tmp_path: Path) -> None:
    work = Store(str(tmp_path))
    planning = PlanningSpec(cost=GPU_DEFAULT, block_size=16)
    for size, ending in (
        (32, "the engines get it, where they support it."),
        (1, "below 1.0% it does not pay, and the engines get vLLM's own."),
    ):
        staged = stage_prompts(work, prompts(groups=8, size=size, prefix=4096), max_tokens=300)
        plan = plan_requests(work, staged, planning, attention=LLAMA_8B)
        assert plan.attention is not None
        assert plan.attention.pays == (size > 1)
        page = plan_markdown(plan)
        assert f"{plan.attention.engine_saving:.1%} of the engines' time: {ending}" in page
        assert "Rates of its kernels: assumed, not measured." in page
        again = plan_requests(
            work, staged, planning, attention=plan.attention.model_copy(update={"engine_saving": 0.5})
        )
        assert again.attention is not None
        assert again.attention.engine_saving == 0.5


def test_nothing_is_expected_of_a_sample_or_of_the_order_of_the_rows(tmp_path: Path) -> None:
    work = Store(str(tmp_path))
    staged = stage_prompts(work, prompts(groups=4, size=8, prefix=4096), max_tokens=300)
    pilot = plan_requests(work, staged, PlanningSpec(pilot_fraction=0.2), pilot=True, attention=LLAMA_8B)
    assert pilot.attention is None
    assert plan_requests(work, staged, PlanningSpec(order="input"), attention=LLAMA_8B).attention is None
    plain = plan_requests(work, staged, PlanningSpec())
    assert plain.attention is None
    assert "Prefix-shared attention" not in plan_markdown(plain)


def test_the_forecast_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from batchllm_operators.plan import shared_attention; "
        "print([m for m in ('torch', 'triton', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
