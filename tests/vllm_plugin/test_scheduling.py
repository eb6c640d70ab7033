"""What the scheduler does in single situations, on vLLM's KV cache manager without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchllm_kernels.vllm_plugin.head_gate import MOST_OVERTAKERS
from batchllm_kernels.vllm_plugin.options import STEP_TRACE_VARIABLE, PlannedRequest
from batchllm_kernels.vllm_plugin.step_trace import read_steps
from tests.vllm_plugin.driven_scheduler import Ask, DrivenScheduler, Limits

Drive = Callable[[Limits, "dict[str, Any] | None"], DrivenScheduler]


def tokens(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


def alone(first: int, prompt_tokens: int, output_tokens: int, expected: int | None = None) -> Ask:
    planned = PlannedRequest(f"alone {first}", 0, output_tokens if expected is None else expected)
    return Ask(tokens(first, prompt_tokens), output_tokens, planned)


def pinned_blocks(driven: DrivenScheduler) -> int:
    """Blocks in use while nothing runs."""
    assert not driven.scheduler.running
    pool = driven.scheduler.kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_ragged_outputs_in_a_tight_cache_are_preempted_by_vllm_and_not_by_us(drive: Drive, asynchronous: bool) -> None:
    asks = [alone(100 * index, 6, 4 + 7 * index % 40) for index in range(1, 13)]
    limits = Limits(blocks=24, asynchronous=asynchronous)
    preemptions = {}
    for name, options in (("vllm", None), ("ours", {}), ("ours without admission", {"admit_by_peak": False})):
        driven = drive(limits, options)
        for index, ask in enumerate(asks):
            driven.add(f"r{index:02}", ask)
        driven.finish()
        driven.assert_everything_is_released()
        preemptions[name] = driven.preemptions
    assert preemptions["ours"] == 0
    assert preemptions["vllm"] > 0
    assert preemptions["ours without admission"] > 0


def test_members_wait_while_their_lead_computes_the_prefix_in_chunks(drive: Drive) -> None:
    prefix = tokens(0, 40)
    asks = [Ask((*prefix, 1000 + index), 4, PlannedRequest("a", 40, 4)) for index in range(3)]
    computed = {}
    for lead_first in (True, False):
        driven = drive(Limits(step_tokens=32, long_prefill_tokens=8), {"lead_first": lead_first})
        for index, ask in enumerate(asks):
            driven.add(f"r{index}", ask)
        driven.finish()
        computed[lead_first] = driven.computed_prompt_tokens
    assert computed[True] == 40 + 3
    assert computed[False] > 2 * 40


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("threshold", [1, 7])
@pytest.mark.parametrize(("second", "own"), [((*tokens(0, 40), 99), 1), (tokens(0, 41), 1), ((*tokens(0, 30), 99), 3)])
def test_blocks_that_are_computed_just_now_are_waited_for_beyond_the_planned_prefix(
    drive: Drive, asynchronous: bool, threshold: int, second: tuple[int, ...], own: int
) -> None:
    computed = {}
    for lead_first in (True, False):
        limits = Limits(step_tokens=32, long_prefill_tokens=threshold, asynchronous=asynchronous)
        driven = drive(limits, {"lead_first": lead_first})
        driven.add("r0", Ask(tokens(0, 41), 4, PlannedRequest("a", 8, 4)))
        driven.add("r1", Ask(second, 4, PlannedRequest("a", 8, 4)))
        driven.finish()
        computed[lead_first] = driven.computed_prompt_tokens
    assert computed[True] == 41 + own
    assert computed[False] > 41 + own


def test_a_head_goes_on_as_soon_as_all_that_it_shares_is_computed(drive: Drive) -> None:
    driven = drive(Limits(step_tokens=32, long_prefill_tokens=8), {})
    driven.add("a", Ask(tokens(0, 41), 4, PlannedRequest("a", 8, 4)))
    driven.add("b", Ask((*tokens(0, 8), *tokens(500, 20)), 4, PlannedRequest("b", 8, 4)))
    driven.step()
    assert driven.admitted == ["a", "b"]


def test_nobody_waits_for_a_request_that_was_aborted_in_its_prefill(drive: Drive) -> None:
    driven = drive(Limits(step_tokens=32, long_prefill_tokens=8), {})
    for name in ("gone", "next"):
        driven.add(name, Ask(tokens(0, 41), 4, PlannedRequest("a", 40, 4)))
    driven.step()
    driven.step()
    assert driven.admitted == ["gone"]
    driven.abort(["gone"])
    driven.step()
    assert driven.admitted == ["gone", "next"]
    driven.finish()
    assert driven.computed_prompt_tokens == 41


def test_a_request_that_reads_no_cache_waits_for_nobody_and_counts_with_all_its_blocks(drive: Drive) -> None:
    driven = drive(Limits(blocks=24, step_tokens=64, long_prefill_tokens=8), {})
    driven.add("reads", Ask(tokens(0, 21), 4, PlannedRequest("a", 20, 4)))
    for name in ("does not", "does not either", "nor this", "nor that"):
        driven.add(name, Ask(tokens(0, 21), 4, PlannedRequest("a", 20, 4), reads_cache=False))
    driven.step()
    assert driven.admitted == ["reads", "does not", "does not either", "nor this"], "six blocks each"
    driven.finish()
    assert driven.preemptions == 0


def test_the_prefix_is_released_with_the_last_request(drive: Drive) -> None:
    driven = drive(Limits(), {})
    driven.add("lead", Ask(tokens(0, 21), 3, PlannedRequest("a", 20, 3)))
    driven.finish()
    assert pinned_blocks(driven) == 0
    driven.assert_everything_is_released()


def test_the_cache_can_be_reset_while_a_prefix_is_pinned(drive: Drive) -> None:
    driven = drive(Limits(), {})
    driven.add("lead", Ask(tokens(0, 21), 1, PlannedRequest("a", 20, 1)))
    driven.add("member", Ask((*tokens(0, 20), 99), 9, PlannedRequest("a", 20, 9)))
    for _ in range(3):
        driven.step()
    assert driven.scheduler.reset_prefix_cache(reset_running_requests=True)
    driven.finish()
    assert len(driven.outputs["member"]) == 9
    driven.assert_everything_is_released()


def test_equal_prompts_fit_a_cache_that_holds_one_of_them_twice_over(drive: Drive) -> None:
    """The last block of a prompt is always computed, so copies of a pinned block must not fill the cache."""
    driven = drive(Limits(block_size=4, blocks=2), {})
    for name, prompt, group in (("a", (1, 2, 3, 4), "0"), ("b", (1, 2, 3, 4), "1"), ("c", (1, 2, 3, 4, 5), "1")):
        driven.add(name, Ask(prompt, 1, PlannedRequest(group, 4, 1)))
    driven.finish()
    assert driven.computed_prompt_tokens == 4 + 4 + 1


def test_the_cheapest_request_is_preempted_when_estimates_are_too_low(drive: Drive) -> None:
    recomputed = {}
    for cheapest_victim in (True, False):
        driven = drive(Limits(blocks=24, step_tokens=64), {"cheapest_victim": cheapest_victim})
        driven.add("short", alone(0, 5, 60, expected=1))
        driven.add("long", alone(100, 60, 24, expected=1))
        driven.finish()
        assert driven.preemptions > 0
        recomputed[cheapest_victim] = driven.computed_tokens
    assert recomputed[True] < recomputed[False]


def test_an_abort_says_nothing_about_the_length_of_outputs(drive: Drive) -> None:
    driven = drive(Limits(blocks=24), {})
    for index in range(40):
        driven.add(f"aborted {index}", alone(100 * index, 3, 40))
    while driven.busy:
        driven.step()
        driven.abort([one.request_id for one in driven.scheduler.running])
    for index in range(4):
        driven.add(f"r{index}", alone(10_000 + 100 * index, 3, 40))
    driven.finish()
    assert driven.preemptions == 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_each_step_is_traced(drive: Drive, asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEP_TRACE_VARIABLE, str(tmp_path / "trace"))
    driven = drive(Limits(block_size=4, blocks=64, asynchronous=asynchronous), {})
    for index in range(3):
        driven.add(f"r{index}", alone(100 * index, 21, 5))
    driven.finish()
    steps = read_steps(tmp_path / "trace")
    assert steps["prefill_tokens"].sum() == driven.computed_prompt_tokens == 3 * 21
    assert steps["decode_tokens"].sum() == 3 * 4
    assert steps["running"].max() == 3
    assert steps["waiting"][0] == 1, "the third prompt waits for the second step's budget"
    assert steps["kv_tokens_capacity"].tolist() == [256] * len(steps)
    assert steps["kv_tokens_used"][0] == 24 + 12, "a prompt of 21 tokens, and 11 of the next"
    assert steps["preempted"].sum() == 0
    assert steps["step_seconds"][0] == 0


def test_requests_that_no_plan_knows_are_answered(drive: Drive) -> None:
    driven = drive(Limits(blocks=24), {})
    for index in range(6):
        driven.add(f"r{index}", Ask(tokens(0, 9), 5 + index, max_tokens=30))
    driven.finish()
    assert [len(driven.outputs[f"r{index}"]) for index in range(6)] == [5, 6, 7, 8, 9, 10]
    driven.assert_everything_is_released()


def test_a_pinned_prefix_is_there_for_sibling_groups_that_had_to_wait_for_memory(drive: Drive) -> None:
    prefix = (13, 14, 15, 16)
    asks = [alone(10, 1, 4), alone(11, 1, 1), alone(12, 1, 17)]
    asks += [
        Ask(prefix, 1, PlannedRequest("a", 4, 1)),
        Ask((*prefix, 17, 18, 19, 20), 13, PlannedRequest("b", 4, 13)),
        Ask(prefix, 1, PlannedRequest("c", 4, 1)),
    ]
    computed = {}
    for pin_prefixes in (True, False):
        driven = drive(Limits(blocks=6, step_tokens=8), {"pin_prefixes": pin_prefixes})
        for index, ask in enumerate(asks):
            driven.add(f"r{index}", ask)
        driven.finish()
        computed[pin_prefixes] = driven.computed_prompt_tokens
    assert computed == {True: 15, False: 19}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_pooling_requests_are_answered_among_others(drive: Drive, asynchronous: bool) -> None:
    driven = drive(Limits(blocks=16, asynchronous=asynchronous), {})
    driven.add("first", alone(0, 9, 5))
    for index in range(4):
        driven.add_pooling(f"p{index}", tokens(100 * index + 100, 22))
    driven.add("last", alone(1000, 9, 5))
    driven.finish()
    assert (len(driven.outputs["first"]), len(driven.outputs["last"])) == (5, 5)
    assert driven.admitted == ["first", "p0", "p1", "p2", "p3", "last"]
    assert driven.preemptions == 0
    driven.assert_everything_is_released()


@pytest.mark.parametrize("max_tokens", [10**6, 10**30])
def test_no_request_is_expected_to_outgrow_the_model(drive: Drive, max_tokens: int) -> None:
    """The model of these tests ends a request at 2,048 tokens: 512 blocks."""
    driven = drive(Limits(blocks=1300), {})
    for index in range(3):
        driven.add(f"r{index}", Ask(tokens(100 * index, 9), 3, max_tokens=max_tokens))
    driven.step()
    assert driven.admitted == ["r0", "r1"]
    driven.finish()


def test_requests_whose_grammar_is_not_compiled_are_passed_over(drive: Drive) -> None:
    driven = drive(Limits(blocks=16), {})
    driven.add("runs", alone(0, 9, 30))
    driven.step()
    large = driven.add_structured("large", Ask(tokens(100, 30), 20))
    driven.add("small", alone(200, 5, 4))
    driven.step()
    assert driven.admitted == ["runs", "small"], "no grammar, no claim to memory"
    large.set_result(object())
    driven.add("behind", alone(300, 5, 4))
    for _ in range(8):
        driven.step()
    assert driven.admitted == ["runs", "small", "behind"], "there is no room for the large one"
    driven.abort(["large"])
    driven.finish()
    driven.assert_everything_is_released()


def test_a_request_whose_grammar_is_not_compiled_leaves_the_pin_alone(drive: Drive) -> None:
    prefix = tokens(0, 8)
    driven = drive(Limits(blocks=16, step_tokens=64), {})
    driven.add("lead", Ask((*prefix, 90), 1, PlannedRequest("a", 8, 1)))
    driven.add("runs", Ask((*prefix, 91), 12, PlannedRequest("a", 8, 12)))
    driven.step()
    driven.add_structured("other", Ask(tokens(500, 9), 4))
    pinned = driven.scheduler.kv_cache_manager.get_blocks("runs").blocks[0][:2]
    driven.step()
    assert [block.ref_cnt for block in pinned] == [2, 2], "of its request and the pin"
    driven.abort(["other"])
    driven.finish()
    driven.assert_everything_is_released()


def test_smaller_requests_overtake_a_head_that_waits_for_memory_a_limited_number_of_times(drive: Drive) -> None:
    steps = {}
    for overtake, overtakers in ((True, MOST_OVERTAKERS), (False, 0)):
        driven = drive(Limits(blocks=24), {"overtake": overtake})
        driven.add("long", alone(0, 4, 60))
        driven.add("head", alone(100, 4, 60))
        for index in range(3 * MOST_OVERTAKERS):
            driven.add(f"short {index}", alone(1000 + 10 * index, 4, 8))
        driven.finish()
        driven.assert_everything_is_released()
        assert driven.preemptions == 0
        assert driven.admitted.index("head") == 1 + overtakers
        steps[overtake] = driven.steps
    assert steps[True] < steps[False]


def test_requests_of_known_lengths_begin_little_by_little_and_keep_the_cache_fuller(drive: Drive) -> None:
    def steps(options: dict[str, Any], expected: list[int]) -> int:
        driven = drive(Limits(blocks=120, max_running=64), options)
        for index in range(120):
            driven.add(f"r{index}", alone(1000 * (index + 1), 6, 80, expected[index % len(expected)]))
        driven.finish()
        driven.assert_everything_is_released()
        if expected == [80]:
            assert driven.preemptions == 0
        return driven.steps

    assert steps({}, [80]) < 0.95 * steps({"spread_ends": False}, [80])
    unknown = [40, 80, 160]
    assert steps({}, unknown) == steps({"spread_ends": False}, unknown)


def test_a_head_that_was_refused_is_looked_at_again_after_a_while(drive: Drive) -> None:
    driven = drive(Limits(blocks=24), {})
    driven.add("first", alone(0, 4, 60))  # 16 blocks at last
    driven.add("head", alone(100, 4, 60))
    driven.finish()
    assert driven.preemptions == 0
    assert driven.steps < 2 * 60 - 20, "it is still small when the first is at its largest"


def test_no_request_overtakes_that_has_to_find_more_than_its_groups_prefix(drive: Drive) -> None:
    prefix, deeper = tokens(0, 8), tokens(500, 4)
    driven = drive(Limits(blocks=24), {})
    driven.add("lead", Ask((*prefix, 90), 50, PlannedRequest("a", 8, 50)))
    driven.add("head", Ask((*prefix, 91), 50, PlannedRequest("a", 8, 50)))
    for index in range(4):
        driven.add(f"deeper {index}", Ask((*prefix, *deeper, 92 + index), 4, PlannedRequest("a", 8, 4)))
    driven.add("other group", alone(1000, 4, 4))
    driven.finish()
    assert driven.admitted[:2] == ["lead", "head"]
    assert driven.computed_prompt_tokens == 8 + 1 + 1 + 4 + 4 + 4


def test_a_head_that_is_nothing_but_the_prefix_is_not_overtaken(drive: Drive) -> None:
    driven = drive(Limits(blocks=24), {})
    driven.add("single", alone(1000, 4, 60))
    driven.add("head", Ask(tokens(0, 8), 40, PlannedRequest("a", 8, 40)))
    driven.add("member", Ask(tokens(0, 9), 4, PlannedRequest("a", 8, 4)))
    driven.finish()
    assert driven.admitted == ["single", "head", "member"]
    assert driven.computed_prompt_tokens == 4 + 8 + 1
