"""Steps share where it is expected to pay: launches, bytes from memory and from the cache, operations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from batchllm_kernels.attention.cost import (
    Decision,
    KernelCalibration,
    Launching,
    ModelHeads,
    StepSetting,
    StepWork,
    Traffic,
    calibration_for,
    decide,
    shared_path_seconds,
    unshared_seconds,
)
from batchllm_kernels.attention.step_traffic import step_work
from batchllm_kernels.attention.work_plan import WorkPlanShape, plan_work
from batchllm_kernels.bench.workloads import DecodeStep, SharingRequest, decode_step, groups

SHAPE = WorkPlanShape(block_size=16, queries_per_kv_head=4)
HEADS = ModelHeads(heads=32, kv_heads=8, head_size=128)
ASSUMED = calibration_for("a device nobody measured")
LAYERS = 32


def step(count: int, *, degree: int = 16, prefix: int = 2000, own: int = 200) -> DecodeStep:
    return decode_step("step", groups(count, prefix=prefix, own=own, degree=degree), 16)


def work_of(made: DecodeStep, device: KernelCalibration = ASSUMED, *, order: list[int] | None = None) -> StepWork:
    rows = np.arange(len(made.seq_lens)) if order is None else np.array(order)
    table, lengths = made.block_table[rows], made.seq_lens[rows]
    return step_work(plan_work(table, lengths, SHAPE), lengths, HEADS, device)


def decision(
    made: DecodeStep, launching: Launching = Launching.CAPTURED, *, prefill_rows: bool = False, **changes: float
) -> Decision:
    device = replace(ASSUMED, **changes)  # type: ignore[arg-type]
    setting = StepSetting(LAYERS, launching, prefill_rows)
    return decide(work_of(made, device), setting, device)


@pytest.mark.parametrize("launching", list(Launching))
def test_long_prefixes_of_many_requests_are_shared(launching: Launching) -> None:
    made = decision(step(16), launching)
    assert made.share
    assert made.shared_seconds < 0.75 * made.stock_seconds


@pytest.mark.parametrize("launching", list(Launching))
def test_a_step_without_sharing_stays_as_it_is(launching: Launching) -> None:
    made = decision(step(64, degree=1), launching)
    assert not made.share
    assert made.reason == "nothing worth sharing"


def test_short_prefixes_are_left_to_the_cache_from_which_stock_attention_reads_them() -> None:
    made = step(16, prefix=256)
    assert not decision(made).share
    assert "needed 10.0%" in decision(made).reason
    assert decision(made, l2_bytes=0.0, l2_bytes_per_second=2.6e12, processors=8).share


def test_a_gain_below_the_minimum_is_not_worth_it() -> None:
    made = decision(step(16))
    gain = 1 - made.shared_seconds / made.stock_seconds
    assert decision(step(16), minimum_gain=gain - 0.01).share
    assert not decision(step(16), minimum_gain=gain + 0.01).share


def test_launches_are_added_and_those_without_work_cost_nothing_where_the_host_launches() -> None:
    free = replace(ASSUMED, captured_launch_seconds=0.0, uncaptured_launch_seconds=0.0)
    work = StepWork(Traffic(9e8), Traffic(1e8, 1e8, 1e9), Traffic(2e8), Traffic(1e6))
    assert work.shared is not None
    assert work.merge is not None
    alone = free.shared_seconds(work.shared) + free.own_seconds(work.own) + free.own_seconds(work.merge)
    for launching, launch_seconds in ((Launching.CAPTURED, 2e-6), (Launching.PIECES, 6e-6)):
        assert shared_path_seconds(work, launching, free) == pytest.approx(alone)
        assert shared_path_seconds(work, launching, ASSUMED) == pytest.approx(alone + 3 * launch_seconds)
    unmerged = replace(work, merge=None)
    saved = free.own_seconds(work.merge)
    assert shared_path_seconds(unmerged, Launching.CAPTURED, ASSUMED) == pytest.approx(alone - saved + 3 * 2e-6)
    assert shared_path_seconds(unmerged, Launching.PIECES, ASSUMED) == pytest.approx(alone - saved + 2 * 6e-6)


def test_a_launch_takes_as_long_as_the_slowest_of_memory_cache_and_arithmetic() -> None:
    assert ASSUMED.shared_seconds(Traffic(1.6e12)) == pytest.approx(1.0)
    assert ASSUMED.shared_seconds(Traffic(0.8e12, 4.7e12)) == pytest.approx(1.0)
    assert ASSUMED.shared_seconds(Traffic(0.8e12, 2e12, 1.6e14)) == pytest.approx(1.0)


def test_rows_of_prompts_beside_cost_a_launch_of_their_own() -> None:
    work = work_of(step(16))
    alone, beside = (
        shared_path_seconds(work, Launching.PIECES, ASSUMED, prefill_rows=prompts) for prompts in (False, True)
    )
    assert beside - alone == pytest.approx(ASSUMED.uncaptured_launch_seconds)


def test_graphs_cost_nothing_where_both_paths_have_them_and_count_against_ours_where_it_has_none() -> None:
    work = work_of(step(16))
    captured, pieces, lost = (
        shared_path_seconds(work, launching, ASSUMED) - unshared_seconds(work, launching, ASSUMED)
        for launching in (Launching.CAPTURED, Launching.PIECES, Launching.STOCK_CAPTURED)
    )
    own_kernel_is_slower = ASSUMED.own_seconds(work.stock) - ASSUMED.stock_seconds(work.stock)
    one_more_launch = ASSUMED.uncaptured_launch_seconds
    assert pieces - captured == pytest.approx(own_kernel_is_slower + one_more_launch)
    launched_by_the_host = ASSUMED.uncaptured_launch_seconds - ASSUMED.captured_launch_seconds
    assert lost - pieces == pytest.approx(ASSUMED.uncaptured_layer_seconds + launched_by_the_host)


def test_a_small_model_does_not_leave_the_graphs_for_a_small_gain() -> None:
    made = step(4, degree=16, prefix=1000, own=100)
    assert decision(made, Launching.CAPTURED).share
    assert not decision(made, Launching.STOCK_CAPTURED).share


def test_the_hosts_time_of_a_plan_counts_once_a_step_where_nothing_hides_it() -> None:
    work = work_of(step(16, prefix=2000))
    for layers, share in ((2, False), (80, True)):
        setting = StepSetting(layers, Launching.CAPTURED, exposed_host_seconds=0.5e-3)
        assert decide(work, setting, ASSUMED).share is share
        assert decide(work, replace(setting, exposed_host_seconds=0.0), ASSUMED).share


def test_arithmetic_bounds_what_many_requests_share() -> None:
    work = work_of(step(1, degree=256, prefix=16_000, own=20))
    assert work.shared is not None
    flops = 4 * 32 * 128 * (256 * 16_000)  # tiles are full
    assert work.shared.flops == flops
    assert ASSUMED.shared_seconds(work.shared) == pytest.approx(flops / 1.6e14)


def test_tiles_that_are_not_full_compute_their_padding() -> None:
    for degree, rows in ((3, 32), (9, 64), (17, 64 + 32)):
        work = work_of(step(1, degree=degree, prefix=1600, own=20))
        assert work.shared is not None
        assert work.shared.flops == 4 * 8 * rows * 128 * 1600


def test_stock_attention_reads_every_context_and_ours_every_block_once() -> None:
    made = step(2, degree=3, prefix=800, own=61)
    work = work_of(made)
    tokens = int(made.seq_lens.sum())
    queries = outputs = 6 * HEADS.query_token_bytes
    assert work.stock.total_bytes == tokens * HEADS.kv_token_bytes + queries + outputs
    assert work.stock.first_bytes == made.unique_kv_tokens * HEADS.kv_token_bytes + queries + outputs
    assert work.shared is not None
    shared_plan = plan_work(made.block_table, made.seq_lens, SHAPE)
    partials = shared_plan.partials * HEADS.partial_bytes
    keys = work.shared.first_bytes + work.own.first_bytes - 2 * partials - 2 * queries - outputs
    assert keys == made.unique_kv_tokens * HEADS.kv_token_bytes


def test_members_that_stand_apart_are_read_from_memory_again() -> None:
    made = step(16)
    grouped = work_of(made)
    shuffled = work_of(made, order=[group * 16 + member for member in range(16) for group in range(16)])
    assert grouped.stock.total_bytes == shuffled.stock.total_bytes
    assert grouped.stock.first_bytes < shuffled.stock.first_bytes
    # the 16 rows beside each other are of 16 groups: not one of them finds anything
    assert shuffled.stock.again_bytes == pytest.approx(0, abs=1)
    assert (grouped.shared, grouped.own) == (shuffled.shared, shuffled.own)


def test_members_that_stand_apart_meet_in_a_cache_that_holds_what_lies_between() -> None:
    made = step(16, prefix=320, own=20)
    order = [group * 16 + member for member in range(16) for group in range(16)]
    between = 16 * 340 * HEADS.kv_token_bytes
    small, large = (replace(ASSUMED, processors=8, l2_bytes=factor * between) for factor in (0.9, 1.1))
    assert work_of(made, small, order=order).stock.again_bytes == pytest.approx(0, abs=1)
    assert work_of(made, large, order=order).stock.first_bytes == work_of(made, large).stock.first_bytes


def test_the_gate_takes_the_order_of_the_batch_into_account() -> None:
    made = step(16, prefix=512, own=400)
    order = [group * 16 + member for member in range(16) for group in range(16)]
    setting = StepSetting(LAYERS, Launching.PIECES)
    assert not decide(work_of(made), setting, ASSUMED).share
    assert decide(work_of(made, order=order), setting, ASSUMED).share


def test_padding_rows_and_rows_alone_are_counted_once() -> None:
    made = decode_step("alone", [SharingRequest((), 300), SharingRequest((), 77)], 16)
    table = np.vstack([made.block_table, np.zeros_like(made.block_table)])
    lengths = np.append(made.seq_lens, [0, 0]).astype(np.int32)
    work = step_work(
        plan_work(table, lengths, replace(SHAPE, target_items=1, own_target_items=1)), lengths, HEADS, ASSUMED
    )
    assert work.stock == work.own == Traffic(377 * HEADS.kv_token_bytes + 4 * HEADS.query_token_bytes)
    assert work.shared is None
    assert work.merge is None


def test_split_own_parts_are_merged() -> None:
    made = decode_step("long", [SharingRequest((), 16_384)], 16)
    plan = plan_work(made.block_table, made.seq_lens, SHAPE)
    work = work_of(made)
    partials = plan.partials * HEADS.partial_bytes
    queries = len(plan.own_items) * HEADS.query_token_bytes
    assert work.own == Traffic(16_384 * HEADS.kv_token_bytes + queries + partials)
    assert work.merge == Traffic(partials + HEADS.query_token_bytes)


def test_devices_that_were_not_measured_say_so() -> None:
    assert ASSUMED.source == "assumed, not measured"
