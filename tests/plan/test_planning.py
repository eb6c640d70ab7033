"""Plans of whole jobs, from staged rows to bundles."""

import random
from pathlib import Path

import pytest

from batchllm_operators.cost import CPU_DEFAULT, Calibration
from batchllm_operators.errors import TerminalError
from batchllm_operators.plan.markdown import plan_markdown
from batchllm_operators.plan.planning import plan_requests
from batchllm_operators.records import PlanSummary
from batchllm_operators.specs.planning import PlanningSpec
from batchllm_operators.store import Store
from batchllm_operators.work.bundles import BUNDLE_SCHEMA
from batchllm_operators.work.layout import PLAN_SUMMARY
from tests.plan.staged_jobs import (
    ideal_computed_tokens,
    key_of,
    planned_prompts,
    planned_rows,
    stage_prompts,
    write_results,
)

BLOCK = 4
PLANNING = PlanningSpec(block_size=BLOCK)


def grouped_prompts(groups: int = 6, members: int = 5, seed: int = 0) -> list[list[int]]:
    """Shuffled prompts of groups with a shared first part, whose groups share a beginning in pairs."""
    chance = random.Random(seed)
    prompts = []
    for group in range(groups):
        prefix = [1000 + group // 2] * 6 + [2000 + group] * 7
        prompts += [
            [*prefix, *(chance.randrange(10_000) for _ in range(chance.randrange(1, 12)))] for _ in range(members)
        ]
    chance.shuffle(prompts)
    return prompts


@pytest.fixture
def work(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def test_every_request_is_planned_once_with_its_tokens_and_its_group_together(work: Store) -> None:
    prompts = grouped_prompts()
    plan = plan_requests(work, stage_prompts(work, prompts), PLANNING)
    rows = planned_rows(work, plan)
    assert sorted(row["prompt_token_ids"] for row in rows) == sorted(prompts)
    assert all(row["request_key"] == key_of(row["prompt_token_ids"]) for row in rows)
    groups = [row["group_id"] for row in rows]
    assert groups == sorted(groups), "groups are numbered as they begin, and no group begins before another has ended"
    for row in rows:
        prefixes = {
            tuple(other["prompt_token_ids"][: row["prefix_tokens"]])
            for other in rows
            if other["group_id"] == row["group_id"]
        }
        assert len(prefixes) == 1
    assert plan.shape.groups == 6
    assert plan.counts.requests == len(prompts)


def test_bundles_have_the_contracts_schema_and_the_summary_is_written_last(work: Store) -> None:
    plan = plan_requests(work, stage_prompts(work, grouped_prompts()), PLANNING)
    with work.parquet(plan.bundles[0].name) as file:
        assert file.schema_arrow.equals(BUNDLE_SCHEMA)
    assert PlanSummary.model_validate_json(work.read_bytes(PLAN_SUMMARY)) == plan
    assert work.names("plan") == sorted([*(bundle.name for bundle in plan.bundles), PLAN_SUMMARY])


def test_the_planned_order_reaches_the_optimum_that_an_ideal_cache_shows(work: Store) -> None:
    prompts = grouped_prompts(groups=8, members=6)
    plan = plan_requests(work, stage_prompts(work, prompts), PLANNING)
    computed = ideal_computed_tokens(planned_prompts(work, plan), BLOCK)
    assert plan.forecast.computed_prompt_tokens == computed
    assert plan.saving.planned == pytest.approx(1 - computed / sum(map(len, prompts)))
    assert plan.saving.optimum == pytest.approx(plan.saving.planned)
    assert plan.saving.single_level < plan.saving.optimum


def test_equal_rows_become_one_request_and_count_as_saved(work: Store) -> None:
    prompts = [[1] * 10, [2] * 10, [1] * 10, [1] * 10]
    plan = plan_requests(work, stage_prompts(work, prompts), PLANNING)
    assert (plan.counts.rows, plan.counts.requests, plan.counts.duplicate_rows) == (4, 2, 2)
    assert plan.saving.optimum == pytest.approx(20 / 40)
    assert plan.saving.single_level == pytest.approx(20 / 40)


def test_rows_with_errors_are_left_out(work: Store) -> None:
    plan = plan_requests(work, stage_prompts(work, [None, [1] * 9, None]), PLANNING)
    assert (plan.counts.rows, plan.counts.requests, plan.counts.prompt_tokens) == (3, 1, 9)


def test_only_what_results_do_not_answer_is_planned(work: Store) -> None:
    prompts = grouped_prompts()
    staged = stage_prompts(work, prompts)
    whole = plan_requests(work, staged, PLANNING)
    write_results(work, prompts[:20], cached_tokens=3)
    rest = plan_requests(work, staged, PLANNING)
    assert sorted(planned_prompts(work, rest)) == sorted(prompts[20:])
    assert (rest.counts.done_requests, rest.counts.requests) == (20, 10)
    assert rest.saving.optimum == whole.saving.optimum
    assert rest.counts.prompt_tokens == whole.counts.prompt_tokens
    done_computed = sum(len(prompt) - 3 for prompt in prompts[:20])
    assert rest.saving.planned == pytest.approx(
        1 - (done_computed + rest.forecast.computed_prompt_tokens) / rest.counts.prompt_tokens
    )


def test_results_with_an_error_are_computed_again(work: Store) -> None:
    prompts = grouped_prompts()
    staged = stage_prompts(work, prompts)
    write_results(work, prompts[:3], failed=True)
    assert plan_requests(work, staged, PLANNING).counts.requests == len(prompts)


def test_a_damaged_result_part_is_computed_again_with_a_warning(work: Store, caplog: pytest.LogCaptureFixture) -> None:
    prompts = grouped_prompts()
    staged = stage_prompts(work, prompts)
    write_results(work, prompts[:3])
    work.write_bytes("results/part-broken.parquet", b"PAR1 not quite")
    assert plan_requests(work, staged, PLANNING).counts.requests == len(prompts) - 3
    assert "part-broken.parquet" in caplog.text


def test_a_damaged_staged_part_is_an_error_that_names_it(work: Store) -> None:
    staged = stage_prompts(work, grouped_prompts())
    work.write_bytes(staged.parts[0].name, b"PAR1 not quite")
    with pytest.raises(TerminalError, match=r"part-00000\.parquet"):
        plan_requests(work, staged, PLANNING)


def test_a_finished_job_has_an_empty_plan(work: Store) -> None:
    prompts = grouped_prompts()
    staged = stage_prompts(work, prompts)
    plan_requests(work, staged, PLANNING)
    write_results(work, prompts)
    plan = plan_requests(work, staged, PLANNING)
    assert plan.bundles == ()
    assert plan.forecast.seconds == 0
    assert work.names("plan") == [PLAN_SUMMARY]


def test_an_empty_job_has_an_empty_plan(work: Store) -> None:
    plan = plan_requests(work, stage_prompts(work, []), PLANNING)
    assert (plan.counts.requests, plan.bundles, plan.saving.optimum) == (0, (), 0.0)


def test_the_plan_does_not_depend_on_the_order_of_the_rows_or_their_parts(work: Store, tmp_path: Path) -> None:
    prompts = grouped_prompts()
    other = Store(str(tmp_path / "other"))
    plan = plan_requests(work, stage_prompts(work, prompts), PLANNING, engines=2)
    again = plan_requests(other, stage_prompts(other, prompts[::-1], rows_per_part=7), PLANNING, engines=2)
    assert [work.read_bytes(one.name) for one in plan.bundles] == [other.read_bytes(one.name) for one in again.bundles]


def test_a_small_memory_gives_the_same_bytes(work: Store) -> None:
    staged = stage_prompts(work, grouped_prompts(groups=20, members=20))
    plan = plan_requests(work, staged, PLANNING, engines=2)
    whole = [work.read_bytes(one.name) for one in plan.bundles]
    small = plan_requests(work, staged, PLANNING.model_copy(update={"memory_gb": 1e-6}), engines=2)
    assert [work.read_bytes(one.name) for one in small.bundles] == whole
    assert small.saving.stock is None, "too large to replay"


def test_an_earlier_plan_leaves_nothing_behind(work: Store) -> None:
    staged = stage_prompts(work, grouped_prompts(groups=20, members=20))
    plan_requests(work, staged, PLANNING, engines=8)
    plan = plan_requests(work, staged, PLANNING)
    assert work.names("plan") == sorted([*(bundle.name for bundle in plan.bundles), PLAN_SUMMARY])


def test_a_pilot_is_a_sample_of_every_group_and_its_lengths_are_learnt_from(work: Store) -> None:
    prompts = grouped_prompts(groups=4, members=20)
    staged = stage_prompts(work, prompts)
    planning = PLANNING.model_copy(update={"pilot_fraction": 0.2})
    pilot = plan_requests(work, staged, planning, pilot=True)
    assert pilot.pilot
    assert (pilot.counts.requests, pilot.shape.groups) == (16, 4)
    assert plan_markdown(pilot).startswith("## Pilot")
    write_results(work, planned_prompts(work, pilot), completion_tokens=5)
    rest = plan_requests(work, staged, planning, pilot=True)
    assert not rest.pilot
    assert rest.counts.requests == len(prompts) - 16
    assert rest.forecast.estimate_sources == {"group": 64}
    assert {row["expected_output_tokens"] for row in planned_rows(work, rest)} == {5}


def test_the_forecast_has_seconds_and_a_price(work: Store) -> None:
    staged = stage_prompts(work, grouped_prompts(groups=20, members=20))
    plan = plan_requests(work, staged, PLANNING, engines=2, usd_per_engine_hour=3600.0)
    engine_seconds = sum(bundle.expected_seconds for bundle in plan.bundles)
    assert plan.forecast.prefill_seconds + plan.forecast.decode_seconds == pytest.approx(engine_seconds, rel=1e-2)
    assert engine_seconds / 2 <= plan.forecast.seconds <= engine_seconds
    assert plan.forecast.usd == pytest.approx(2 * plan.forecast.seconds, rel=1e-2)
    assert sum(group.expected_seconds for group in plan.shape.largest_groups) <= engine_seconds


def test_measured_rates_go_before_the_hardwares_and_the_jobs_own_before_both(work: Store) -> None:
    staged = stage_prompts(work, grouped_prompts())
    slow = CPU_DEFAULT.model_copy(update={"prefill_tokens_per_second": 1.0})
    slower = CPU_DEFAULT.model_copy(update={"prefill_tokens_per_second": 0.5})
    measured = Calibration(rates=slow, device="a slow one", measured_at="2026-01-31 12:00:00", seconds=5.0)
    plan = plan_requests(work, staged, PLANNING, calibrated=measured)
    own = plan_requests(work, staged, PLANNING.model_copy(update={"cost": slower}), calibrated=measured)
    assert plan_requests(work, staged, PLANNING).forecast.rates == "hardware default"
    assert (plan.forecast.rates, own.forecast.rates) == ("calibrated on a slow one at 2026-01-31 12:00:00 UTC", "job")
    assert own.forecast.prefill_seconds == pytest.approx(2 * plan.forecast.prefill_seconds)


def test_the_plan_says_what_a_stock_engine_would_save(work: Store) -> None:
    prompts = grouped_prompts(groups=30, members=10)
    small = CPU_DEFAULT.model_copy(update={"kv_capacity_tokens": 200, "max_running_requests": 2})
    plan = plan_requests(work, stage_prompts(work, prompts), PLANNING.model_copy(update={"cost": small}))
    assert plan.saving.stock is not None
    assert 0 < plan.saving.stock < 0.5 * plan.saving.planned
    as_given = plan_requests(
        work, stage_prompts(work, prompts), PLANNING.model_copy(update={"cost": small, "order": "input"})
    )
    assert as_given.saving.planned < plan.saving.planned
    assert planned_prompts(work, as_given) == prompts


def test_sharing_is_shown_by_degree_and_as_a_forest(work: Store) -> None:
    plan = plan_requests(work, stage_prompts(work, [*grouped_prompts(), [9] * 9]), PLANNING)
    assert [(one.up_to, one.groups, one.requests) for one in plan.shape.sharing_degrees] == [(1, 1, 1), (8, 6, 30)]
    assert sum(one.saved_tokens for one in plan.shape.sharing_degrees) == sum(
        group.saved_tokens for group in plan.shape.largest_groups
    )
    roots = [prefix for prefix in plan.shape.shared_prefixes if prefix.parent < 0]
    assert [prefix.requests for prefix in roots] == [10, 10, 10]
    for prefix in plan.shape.shared_prefixes:
        if prefix.parent >= 0:
            assert prefix.prefix_tokens > plan.shape.shared_prefixes[prefix.parent].prefix_tokens


def test_sampling_overrides_travel_with_their_requests(work: Store) -> None:
    prompts = [[number] * 9 for number in range(6)]
    overrides = [None, '{"temperature": 0.5}', None, '{"top_p": 0.5}', '{"temperature": 0.5}', None]
    plan = plan_requests(work, stage_prompts(work, prompts, sampling=overrides), PLANNING)
    assert {row["prompt_token_ids"][0]: row["sampling"] for row in planned_rows(work, plan)} == dict(
        enumerate(overrides)
    )


def test_every_worker_gets_a_bundle(work: Store) -> None:
    prompts = [[7] * 20 + [number] * 4 for number in range(40)]
    plan = plan_requests(work, stage_prompts(work, prompts), PLANNING, engines=4)
    assert len(plan.bundles) == 4
    longest = max(bundle.expected_seconds for bundle in plan.bundles)
    assert longest < 1.5 * min(bundle.expected_seconds for bundle in plan.bundles)
    assert plan.saving.planned < plan.saving.optimum, "the shared prefix is computed by each engine"
