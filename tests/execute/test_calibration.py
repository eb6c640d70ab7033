"""Calibration on an engine whose rates are known; `vllm_contract` holds its counts against those of vLLM."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import pytest

from batchllm_operators.cost import CPU_DEFAULT, Calibration, rates_source
from batchllm_operators.errors import RowError, RowErrorCode
from batchllm_operators.execute.calibration import (
    ENOUGH_SECONDS,
    calibrate,
    calibration_budget,
    measure,
    synthetic_loads,
)
from batchllm_operators.execute.engine import EngineLimits, Request
from batchllm_operators.specs.planning import CostModel
from batchllm_operators.tasks import Answer

LIMITS = EngineLimits(
    device="2 x Abacus",
    vocabulary=1000,
    kv_capacity_tokens=100_000,
    max_running_requests=256,
    max_request_tokens=4096,
    max_step_tokens=2048,
    dtype="float64",
)
BLOCK = 32


class RatedEngine:
    """An engine that takes exactly the time its rates say, on a clock of its own; with a prefix cache."""

    def __init__(self, rates: CostModel = CPU_DEFAULT, limits: EngineLimits = LIMITS, stop_after: int = 10_000) -> None:
        self.rates = rates
        self.limits = limits
        self.stop_after = stop_after
        self.now = 0.0
        self.cache: set[tuple[int, ...]] = set()
        self.held: list[list[Any]] = []
        self.submitted: list[Request] = []

    capacity = 512

    @property
    def unfinished(self) -> int:
        return len(self.held)

    def submit(self, request: Request) -> Answer | None:
        self.submitted.append(request)
        prompt = request.prompt_token_ids
        cached = (len(prompt) - 1) // BLOCK * BLOCK if tuple(prompt) in self.cache else 0
        self.held.append([request, cached, len(prompt) - cached, 0])
        return None

    def step(self) -> list[Answer]:
        left = self.limits.max_step_tokens
        seconds = self.rates.step_seconds
        done = []
        for one in self.held:
            request, _, prefill, output = one
            if prefill:
                computed = min(prefill, left)
                left -= computed
                one[2] -= computed
                seconds += computed / self.rates.prefill_tokens_per_second
                if one[2] == 0:
                    one[3] = 1
            else:
                context = len(request.prompt_token_ids) + output
                seconds += 1 / self.rates.decode_tokens_per_second + context / self.rates.kv_tokens_per_second
                one[3] += 1
            if one[3] and one[3] >= min(request.sampling.max_tokens, self.stop_after):
                done.append(one)
        self.now += seconds
        for one in done:
            self.held.remove(one)
            self.cache.add(tuple(one[0].prompt_token_ids))
        return [
            Answer(request.key, ([1] * output, "", "length"), len(request.prompt_token_ids), cached, output)
            for request, cached, _, output in done
        ]

    def abort(self, keys: Collection[bytes]) -> None:
        self.held = [one for one in self.held if one[0].key not in keys]

    def close(self) -> None: ...


def test_the_rates_of_an_engine_are_found_from_outside() -> None:
    engine = RatedEngine()
    found = calibrate(engine, clock=lambda: engine.now)
    assert found is not None
    expected = CPU_DEFAULT.model_copy(update={"kv_capacity_tokens": 100_000})
    assert found.rates.model_dump() == pytest.approx(expected.model_dump(), rel=0.02)
    assert found.device == "2 x Abacus"
    assert found.seconds == pytest.approx(engine.now, abs=0.001)
    assert engine.unfinished == 0


def test_steps_that_something_else_holds_up_do_not_count() -> None:
    class HeldUp(RatedEngine):
        """Loses time at every third step of decode, and in one of the two prefills of each load."""

        decode_steps = prefill_runs = 0

        def step(self) -> list[Answer]:
            decoding = all(prefill == 0 for _, _, prefill, _ in self.held)
            alone = all(request.sampling.max_tokens == 1 for request, *_ in self.held)
            finished = super().step()
            self.decode_steps += decoding
            self.prefill_runs += alone and not self.held
            if decoding and self.decode_steps % 3 == 0:
                self.now += 0.3
            if alone and not self.held and self.prefill_runs % 2:
                self.now += 1.0
            return finished

    engine = HeldUp()
    found = calibrate(engine, clock=lambda: engine.now)
    assert found is not None
    expected = CPU_DEFAULT.model_copy(update={"kv_capacity_tokens": 100_000})
    assert found.rates.model_dump() == pytest.approx(expected.model_dump(), rel=0.02)


def test_a_model_that_ends_its_answers_early_is_measured_on_what_it_gave() -> None:
    engine = RatedEngine(stop_after=5)
    found = calibrate(engine, clock=lambda: engine.now)
    assert found is not None
    assert found.rates.decode_tokens_per_second == pytest.approx(CPU_DEFAULT.decode_tokens_per_second, rel=0.05)


def test_a_model_that_never_gives_a_second_token_is_not_calibrated(caplog: pytest.LogCaptureFixture) -> None:
    engine = RatedEngine(stop_after=1)
    with caplog.at_level(logging.WARNING):
        assert calibrate(engine, clock=lambda: engine.now) is None
    assert "prefill and decode" in caplog.text


def test_an_engine_that_refuses_random_tokens_is_not_calibrated(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(RatedEngine):
        def submit(self, request: Request) -> Answer | None:
            return Answer(request.key, error=RowError(RowErrorCode.ENGINE_ERROR, "not these"))

    engine = Refusing()
    with caplog.at_level(logging.WARNING):
        assert calibrate(engine, clock=lambda: engine.now) is None
    assert "not these" in caplog.text


def test_the_prompts_share_no_block_and_stay_in_the_vocabulary() -> None:
    engine = RatedEngine()
    for _ in measure(engine, clock=lambda: engine.now):
        pass
    prompts = {tuple(request.prompt_token_ids) for request in engine.submitted}
    assert len({prompt[:BLOCK] for prompt in prompts}) == len(prompts)
    assert {token for prompt in prompts for token in prompt} <= set(range(LIMITS.vocabulary))


def test_a_slow_engine_is_measured_on_the_small_loads_only() -> None:
    def width(rates: CostModel) -> int:
        engine = RatedEngine(rates)
        return max(run.decode_tokens for run in measure(engine, clock=lambda: engine.now))

    slow = CPU_DEFAULT.model_copy(update={"step_seconds": ENOUGH_SECONDS})
    fast = CPU_DEFAULT.model_copy(update={"step_seconds": 0.001, "prefill_tokens_per_second": 1e6})
    assert width(slow) < width(CPU_DEFAULT) < width(fast)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_running_requests": 1},
        {"max_request_tokens": 2},
        {"max_request_tokens": 64, "max_running_requests": 8},
        {"kv_capacity_tokens": 40},
        {"max_step_tokens": 16},
    ],
    ids=str,
)
def test_the_loads_stay_within_the_limits_of_a_small_engine(changes: dict[str, int]) -> None:
    limits = EngineLimits(**{**{name: getattr(LIMITS, name) for name in LIMITS.__slots__}, **changes})
    always, in_time = synthetic_loads(limits)
    loads = always + in_time
    assert len(set(loads)) == len(loads) >= 1
    for load in loads:
        assert load.requests <= limits.max_running_requests
        assert load.prompt_tokens + load.output_tokens <= limits.max_request_tokens
        assert load.requests == 1 or load.requests * (load.prompt_tokens + load.output_tokens) <= (
            limits.kv_capacity_tokens
        )


@pytest.mark.parametrize(
    ("forecast_seconds", "budget"), [(0, None), (119.9, None), (120, 6.0), (200, 10.0), (400, 20.0), (36_000, 20.0)]
)
def test_the_budget_is_a_twentieth_of_the_job_or_20_seconds_and_short_jobs_have_none(
    forecast_seconds: float, budget: float | None
) -> None:
    assert calibration_budget(forecast_seconds) == budget


SLOW = CPU_DEFAULT.model_copy(
    update={"step_seconds": 0.1, "prefill_tokens_per_second": 55.0, "decode_tokens_per_second": 32.0}
)


@pytest.mark.parametrize("seconds", [6.0, 12.0, 20.0])
def test_a_calibration_ends_when_its_budget_is_spent_but_for_the_step_that_runs(seconds: float) -> None:
    engine = RatedEngine(SLOW)
    longest_step = SLOW.step_seconds + 128 / SLOW.prefill_tokens_per_second
    found = calibrate(engine, seconds=seconds, default=CPU_DEFAULT, clock=lambda: engine.now)
    assert engine.now <= seconds + longest_step
    assert engine.unfinished == 0
    assert max(len(request.prompt_token_ids) for request in engine.submitted) == 128
    if found is not None:
        assert "decode_tokens_per_second" in found.assumed


def test_what_there_was_no_time_to_measure_is_the_default_at_the_speed_that_was_measured() -> None:
    tenth = CPU_DEFAULT.model_copy(
        update={
            "step_seconds": 10 * CPU_DEFAULT.step_seconds,
            "prefill_tokens_per_second": CPU_DEFAULT.prefill_tokens_per_second / 10,
            "decode_tokens_per_second": CPU_DEFAULT.decode_tokens_per_second / 10,
            "kv_tokens_per_second": CPU_DEFAULT.kv_tokens_per_second / 10,
        }
    )
    engine = RatedEngine(tenth)
    found = calibrate(engine, seconds=3.5, default=CPU_DEFAULT, clock=lambda: engine.now)
    assert found is not None
    assert found.assumed == ("decode_tokens_per_second", "kv_tokens_per_second")
    expected = tenth.model_copy(update={"kv_capacity_tokens": LIMITS.kv_capacity_tokens})
    assert found.rates.model_dump() == pytest.approx(expected.model_dump(), rel=0.02)
    told = rates_source(None, found)
    assert "not measured but scaled from the hardware's default: decode tokens per second, kv tokens per second" in told


def test_an_engine_too_slow_for_the_smallest_load_is_not_calibrated(caplog: pytest.LogCaptureFixture) -> None:
    engine = RatedEngine(SLOW.model_copy(update={"prefill_tokens_per_second": 10.0}))
    with caplog.at_level(logging.WARNING):
        assert calibrate(engine, seconds=6.0, clock=lambda: engine.now) is None
    assert "no calibration within 6.0 s" in caplog.text
    assert engine.now < 20


def test_a_calibration_says_on_what_and_with_what_it_was_made() -> None:
    engine = RatedEngine()
    found = calibrate(engine, model="org/name@v1", clock=lambda: engine.now)
    assert found is not None
    assert (found.model, found.dtype, found.assumed) == ("org/name@v1", "float64", ())
    assert found.versions is not None
    assert found.versions["batchllm-flows"]
    assert found.load_per_core is not None
    assert found.load_per_core >= 0


@pytest.mark.parametrize(("load", "told"), [(None, False), (0.4, False), (3.0, True)])
def test_rates_of_a_busy_machine_are_told_apart(load: float | None, told: bool) -> None:
    found = Calibration(rates=CPU_DEFAULT, device="d", measured_at="2026-01-31 12:00:00", seconds=1, load_per_core=load)
    assert ("while the machine was busy (load 3.0 per core)" in rates_source(None, found)) is told
