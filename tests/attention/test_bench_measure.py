"""The benchmark's harness: nothing wrong is timed, and rivals that are missing are named with the reason."""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from batchllm_kernels.bench import check, layered_step, measure, replay, tune
from batchllm_kernels.bench.calibrate import launch_seconds, measured_step
from batchllm_kernels.bench.check import check_cases
from batchllm_kernels.bench.fit import device_for_fit
from batchllm_kernels.bench.flash_attention_3 import LIBRARY_VARIABLE, FlashAttention3, FlashAttention3UnavailableError
from batchllm_kernels.bench.grid import GridPoint, important_points, whole_grid
from batchllm_kernels.bench.host_time import WITH_LAUNCHES, WITHOUT_LAUNCHES, layer_microseconds
from batchllm_kernels.bench.layered_step import layer_count
from batchllm_kernels.bench.measure import MeasuredPoint, WrongResultError, measure_point
from batchllm_kernels.bench.ours import IDLE, OWN_LAUNCH, SHARED, SHARED_LAUNCH, UNSHARED, our_call, plan_of
from batchllm_kernels.bench.rivals import FLASH_ATTENTION_3, FLASH_ATTENTION_3_HEURISTIC, SDPA, Rivals
from batchllm_kernels.bench.setup import Setup, rehearsal_setup
from batchllm_kernels.bench.timers import ROUNDS, LayerCall, graph_replay_times, wall_clock_times

TINY = GridPoint(48, 3, own=5, heads=4, kv_heads=2, head_size=16, requests=6)


def never(_: Mapping[str, LayerCall], __: int) -> dict[str, float]:
    raise AssertionError("timed before it was checked")


def test_a_point_is_measured_with_all_implementations_and_each_launch_alone(device: torch.device) -> None:
    timed: dict[str, int] = {}

    def timer(calls: Mapping[str, LayerCall], layers: int) -> dict[str, float]:
        timed.update(dict.fromkeys(calls, layers))
        return {name: 10.0 * (at + 1) for at, name in enumerate(calls)}

    one = measure_point(TINY, device, timer, torch.float32, "no library", layers=2)
    assert set(timed) == {SHARED, UNSHARED, SDPA, SHARED_LAUNCH, OWN_LAUNCH, IDLE}
    assert set(timed.values()) == {2}
    assert one.requests == 6
    assert one.error < 1e-5
    assert (one.best_other, one.speedup) == (SDPA, 3.0)
    assert one.minimum_bytes < one.dense_bytes
    assert one.skipped == {FLASH_ATTENTION_3: "no library", "vLLM": "no kernel for cpu"}


def test_a_row_of_results_gives_the_point_back(device: torch.device) -> None:
    one = measure_point(TINY, device, wall_clock_times, torch.float32, "no library", layers=1)
    row = one.row(3e12)
    assert row["flash_attention_3_over_ours"] is None
    seconds = one.microseconds[SHARED] / 1e6
    assert row["share_of_copy_bandwidth"] == pytest.approx(one.minimum_bytes / seconds / 3e12)
    assert row["own_bytes_per_second"] == pytest.approx(one.own_bytes / one.microseconds[OWN_LAUNCH] * 1e6)
    assert MeasuredPoint.of_row(row) == one


def test_a_wrong_result_is_not_timed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MAX_ERROR", 0.0)
    with pytest.raises(WrongResultError, match=r"prefix-shared: expected a relative error of at most 0.0, got"):
        measure_point(TINY, device, never, torch.bfloat16, "no library", layers=1)


def test_a_rival_that_is_wrong_or_fails_is_not_timed_and_named(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(layer: int) -> torch.Tensor:
        return torch.ones(6, 4, 16)

    def failing(layer: int) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(measure, "rivals", lambda *_: Rivals({"wrong": wrong, "failing": failing}))
    one = measure_point(TINY, device, wall_clock_times, torch.float32, "no library", layers=1)
    assert one.skipped["failing"] == "RuntimeError: no kernel image"
    assert one.skipped["wrong"].startswith("WrongResultError: wrong: expected a relative error")
    assert set(one.microseconds) == {SHARED, UNSHARED, SHARED_LAUNCH, OWN_LAUNCH, IDLE}
    assert one.speedup is None


class Graph:
    """A captured graph that keeps when it is replayed."""

    log: ClassVar[list[Graph]] = []

    def replay(self) -> None:
        self.log.append(self)


class Event:
    """An event of a device on which every replay takes a millisecond."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = len(Graph.log)

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return float(end.at - self.at)


def test_all_layers_are_captured_together_and_implementations_are_timed_in_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Graph, "log", [])

    def run(name: str, layer: int) -> torch.Tensor:
        ran.append((name, layer))
        return torch.zeros(1)

    times = graph_replay_times({name: partial(run, name) for name in ("a", "b")}, 4)
    assert times == {"a": 250.0, "b": 250.0}
    assert ran[:8] == [("a", layer) for layer in range(4)] * 2  # run, then captured
    turns = [graph for graph, _ in groupby(Graph.log)]
    assert len(turns) == 2 + 2 * ROUNDS
    assert len(set(turns)) == 2


def test_a_result_that_leaves_a_row_unwritten_is_wrong(device: torch.device) -> None:
    inputs = layered_step.layered_step(replace(TINY, requests=60), device, torch.float32, layers=1)
    whole = our_call(inputs, plan_of(inputs, share=True))

    def without_one_row(layer: int) -> torch.Tensor:
        result = whole(layer)
        result[1] = torch.nan  # not one of those that the reference is computed for
        return result

    with pytest.raises(WrongResultError, match="got nan"):
        measure.checked_errors({"ours": without_one_row}, inputs)


def test_implementations_that_differ_where_the_reference_does_not_look_are_wrong(device: torch.device) -> None:
    inputs = layered_step.layered_step(replace(TINY, requests=60), device, torch.float32, layers=1)
    whole = our_call(inputs, plan_of(inputs, share=True))

    def off_by_one(layer: int) -> torch.Tensor:
        result = whole(layer).clone()
        result[1] += 1
        return result

    with pytest.raises(WrongResultError, match="rival: expected"):
        measure.checked_errors({"ours": whole, "rival": off_by_one}, inputs)


def test_the_grid_begins_with_the_important_points_and_has_each_once() -> None:
    grid = list(whole_grid())
    important = list(important_points())
    assert grid[: len(important)] == important
    assert len({point.key for point in grid}) == len(set(grid)) == len(grid)
    shapes = [(point.prefix, point.degree) for point in important[:9]]
    assert shapes == [
        (2000, 16), (16000, 64), (4096, 64), (256, 16), (2000, 2), (2000, 64), (2000, 256), (256, 1024), (2000, 1),
    ]  # fmt: skip
    assert {(point.heads, point.kv_heads) for point in grid} == {(32, 8), (40, 8), (64, 8)}
    assert (min(p.prefix for p in grid), max(p.prefix for p in grid)) == (256, 16000)
    assert (min(p.degree for p in grid if p.degree > 1), max(p.degree for p in grid)) == (2, 1024)
    assert {point.shuffled for point in grid} == {True, False}


@pytest.mark.parametrize("point", [GridPoint(2000, 16), GridPoint(16000, 2), GridPoint(2000, 1)])
def test_a_step_fits_the_memory_and_has_at_most_so_many_requests(point: GridPoint) -> None:
    step = point.step()
    assert len(step.seq_lens) <= point.requests
    assert step.unique_kv_tokens * point.model.kv_token_bytes <= 41e9


def test_a_shuffled_step_has_the_requests_of_the_grouped_one_in_another_order() -> None:
    grouped, shuffled = (GridPoint(64, 4, requests=32, shuffled=order).step() for order in (False, True))
    assert sorted(map(tuple, grouped.block_table)) == sorted(map(tuple, shuffled.block_table))
    neighbours = [int((step.block_table[1:, 0] == step.block_table[:-1, 0]).sum()) for step in (grouped, shuffled)]
    assert neighbours[0] == 24
    assert neighbours[1] < 12


def test_small_caches_get_so_many_layers_that_none_stays_in_the_second_level_cache() -> None:
    assert layer_count(5 * 10**9, 50 * 2**20) == 8
    assert layer_count(9 * 10**9, 50 * 2**20) == 4
    assert layer_count(60 * 10**9, 50 * 2**20) == 1
    assert layer_count(8 * 2**20, 50 * 2**20) == 25
    assert layer_count(2**10, 50 * 2**20) == 64


def test_a_library_that_is_not_there_or_does_not_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    with pytest.raises(FlashAttention3UnavailableError, match=f"{LIBRARY_VARIABLE}: expected the path"):
        FlashAttention3()
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "no.so"))
    with pytest.raises(FlashAttention3UnavailableError, match=r"no\.so"):
        FlashAttention3()
    text = tmp_path / "text.so"
    text.write_bytes(b"not a library")
    broken, packed = tmp_path / "broken.so.xz", tmp_path / "packed.so.xz"
    broken.write_bytes(b"not compressed")
    packed.write_bytes(lzma.compress(b"not a library"))
    for path in (text, broken, packed):
        with pytest.raises(FlashAttention3UnavailableError, match=path.name):
            FlashAttention3(path)
    assert "no.so" in str(rehearsal_setup(None).flash_attention_3)


def small(setup: Setup) -> Setup:
    return replace(setup, layers=1)


def test_odd_shapes_are_checked_with_and_without_sharing(device: torch.device) -> None:
    case = next(case for case in check_cases() if case.padding)
    case = replace(case, heads=2, kv_heads=1, head_size=16, dtype=torch.float32)
    errors = check.check(case, device)["errors"]
    assert set(errors) == {"shared", "unshared"}
    assert max(errors.values()) < 1e-5


def test_a_case_that_is_wrong_fails(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(next(check_cases()), heads=2, kv_heads=1, head_size=16, dtype=torch.float32)
    monkeypatch.setitem(check.TOLERANCES, torch.float32, 0.0)
    with pytest.raises(WrongResultError, match=r"prefixes of two levels: expected relative errors of at most 0\.0"):
        check.check(case, device)


def test_the_cases_have_every_ratio_of_heads_head_size_dtype_and_block_size() -> None:
    cases = list(check_cases())
    assert {case.heads // case.kv_heads for case in cases} >= {1, 3, 4, 8, 32}
    assert {case.head_size for case in cases} == {64, 80, 96, 128, 256}
    assert {case.dtype for case in cases} == {torch.float32, torch.float16, torch.bfloat16}
    assert {case.block_size for case in cases} == {16, 32, 64}
    assert len({case.name for case in cases}) == len(cases)


def test_a_step_is_replayed_with_changed_plans(device: torch.device) -> None:
    row = replay.replay_row(small(rehearsal_setup(None)), replace(TINY, prefix=32, requests=4, degree=2))
    assert set(row["relative_errors"]) >= {"as captured", "nothing shared", "fewer rows", "as captured, again"}
    assert max(row["relative_errors"].values()) < 1e-5
    assert set(row["microseconds"]) >= {"sharing", "idle sharing"}


def test_a_step_whose_replay_does_not_see_the_new_plan_is_found_out(device: torch.device) -> None:
    def frozen(step: object) -> object:
        """A capture that ran once: later replays change nothing."""
        return lambda: None

    setup = replace(small(rehearsal_setup(None)), capture=frozen)  # type: ignore[arg-type]
    with pytest.raises(WrongResultError, match="as captured: expected a relative error"):
        replay.replay_row(setup, replace(TINY, prefix=32, requests=4, degree=2))


def test_tuning_takes_the_fastest_parameters_of_each_kernel(device: torch.device) -> None:
    def row(kernel: str, tile: int, first: float, second: float) -> dict[str, object]:
        return {"kernel": kernel, "parameters": {"tile": tile}, "microseconds": {"a": first, "b": second}}

    rows = [
        row("own", 16, 100.0, 10.0), row("own", 32, 110.0, 5.0), row("own", 64, 101.0, 9.9),
        row("shared", 64, 7.0, 7.0), row("shared", 128, 6.0, 9.0),
    ]  # fmt: skip
    assert tune.best(rows) == {"own": {"tile": 32}, "shared": {"tile": 64}}
    with pytest.raises(ValueError, match="shared: expected candidates that were measured, got none"):
        tune.best(rows[:3])


def test_a_candidate_is_checked_and_its_launch_alone_is_timed(device: torch.device) -> None:
    setup = small(rehearsal_setup(None))
    for candidate in tune.candidates(setup).values():
        row = tune.measured(setup, candidate)
        assert row["kernel"] == candidate.kernel
        assert min(row["microseconds"].values()) > 0
        assert max(tune.compiled(setup, candidate)["errors"].values()) < 1e-5


def test_a_search_tries_both_kernels_from_its_start_and_nothing_twice() -> None:
    setup = replace(rehearsal_setup(None), rehearsal=False)
    for quick in (True, False):
        kernels = [candidate.kernel for candidate in tune.candidates(setup, quick=quick).values()]
        assert {"shared", "own"} == set(kernels[:4])
    assert len(tune.candidates(setup, quick=True)) < len(tune.candidates(setup))


def test_the_kernels_run_as_before_when_host_time_was_measured(device: torch.device) -> None:
    assert layer_microseconds(torch.device("cpu"))[WITHOUT_LAUNCHES] > 0
    inputs = layered_step.layered_step(TINY, device, torch.float32, layers=1)
    assert measure.checked_errors({"ours": our_call(inputs, plan_of(inputs, share=True))}, inputs)["ours"] < 1e-5


def test_measured_points_become_steps_of_the_fit(device: torch.device) -> None:
    bare = device_for_fit(l2_bytes=50e6, processors=132)
    times = {
        SHARED: 50.0,
        SHARED_LAUNCH: 20.0,
        OWN_LAUNCH: 28.0,
        FLASH_ATTENTION_3: 90.0,
        FLASH_ATTENTION_3_HEURISTIC: 80.0,
    }
    point = MeasuredPoint(GridPoint(2000, 16, requests=64), 64, 8, times, {}, 0.0, 10**8, 10**9, 10**7)
    step = measured_step(point, bare, torch.device("cpu"), torch.bfloat16)
    assert (step.stock, step.shared, step.own, step.whole) == pytest.approx((80e-6, 20e-6, 28e-6, 50e-6))
    assert step.work.shared is not None
    ours = step.work.shared.first_bytes + step.work.own.first_bytes
    assert ours < step.work.stock.total_bytes
    alone = replace(point, microseconds={SHARED: 50.0, OWN_LAUNCH: 28.0})
    assert measured_step(alone, bare, torch.device("cpu"), torch.bfloat16).stock is None


def test_a_launch_costs_the_host_what_a_call_takes_over_its_launches() -> None:
    rows = [{"what": WITHOUT_LAUNCHES, "microseconds": 8.0}, {"what": WITH_LAUNCHES, "microseconds": 12.0}]
    assert launch_seconds(rows) == pytest.approx(6e-6)
