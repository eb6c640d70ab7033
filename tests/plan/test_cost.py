"""Rates of engines: fitted, kept, and used for the forecast."""

import numpy as np
import pytest

from batchllm_operators.cost import (
    CPU_DEFAULT,
    RATES,
    MeasuredRuns,
    default_cost_model,
    engine_seconds,
    fit_cost_model,
    forecast,
    unmeasured_rates,
)
from batchllm_operators.specs.planning import CostModel


def runs_of(cost: CostModel, count: int = 60, noise: float = 0.0) -> MeasuredRuns:
    chance = np.random.default_rng(0)
    steps = chance.integers(1, 30, count)
    prefill = chance.integers(0, 4000, count)
    decode = chance.integers(0, 200, count)
    kv = decode * chance.integers(100, 4000, count)
    seconds = (
        steps * cost.step_seconds
        + prefill / cost.prefill_tokens_per_second
        + decode / cost.decode_tokens_per_second
        + kv / cost.kv_tokens_per_second
    )
    return MeasuredRuns(steps, prefill, decode, kv, seconds * (1 + noise * chance.standard_normal(count)))


def test_a_fit_finds_the_rates_that_made_the_runs() -> None:
    fitted = fit_cost_model(runs_of(CPU_DEFAULT), kv_capacity_tokens=170_000, max_running_requests=256)
    assert fitted.model_dump() == pytest.approx(CPU_DEFAULT.model_dump(), rel=1e-6)


def test_a_fit_of_noisy_runs_is_near_and_never_negative() -> None:
    fitted = fit_cost_model(runs_of(CPU_DEFAULT, 400, 0.05), kv_capacity_tokens=1, max_running_requests=1)
    assert fitted.prefill_tokens_per_second == pytest.approx(CPU_DEFAULT.prefill_tokens_per_second, rel=0.1)
    assert fitted.step_seconds >= 0


def test_a_fit_needs_prefill_and_decode() -> None:
    only_prefill = MeasuredRuns(
        np.ones(9, np.int64), np.arange(9), np.zeros(9, np.int64), np.zeros(9, np.int64), np.ones(9)
    )
    with pytest.raises(ValueError, match="with prefill and decode among them"):
        fit_cost_model(only_prefill, kv_capacity_tokens=1, max_running_requests=1)


def test_longer_prompts_and_outputs_cost_more_and_a_small_cache_makes_decode_slow() -> None:
    prompts = np.array([100, 100, 1000], dtype=np.int32)
    outputs = np.array([10, 20, 20], dtype=np.int32)
    roomy = forecast(prompts, outputs, CPU_DEFAULT)
    assert (np.diff(roomy.decode) > 0).all()
    tight = forecast(prompts, outputs, CPU_DEFAULT.model_copy(update={"kv_capacity_tokens": 400}))
    assert (tight.decode > roomy.decode).all()


def test_the_forecast_of_nothing_is_nothing() -> None:
    nothing = np.zeros(0, dtype=np.int32)
    assert forecast(nothing, nothing, default_cost_model()).decode.shape == (0,)


def test_totals_cost_what_requests_of_the_same_size_cost() -> None:
    prompts, outputs = np.full(50, 300, dtype=np.int32), np.full(50, 40, dtype=np.int32)
    single = forecast(prompts, outputs, CPU_DEFAULT)
    total = engine_seconds(CPU_DEFAULT, requests=50, prompt_tokens=15_000, computed_tokens=15_000, output_tokens=2_000)
    assert total == pytest.approx(single.decode.sum() + single.prefill_per_token * 15_000)
    assert engine_seconds(CPU_DEFAULT, requests=0, prompt_tokens=0, computed_tokens=0, output_tokens=0) == 0


@pytest.mark.parametrize(
    ("steps", "prefill", "decode", "kv", "missing"),
    [
        ([1], [128], [0], [0], ("decode_tokens_per_second", "kv_tokens_per_second")),
        ([1, 16], [128, 0], [0, 16], [0, 2048], ("decode_tokens_per_second", "kv_tokens_per_second")),
        ([1, 16, 16], [128, 0, 0], [0, 16, 128], [0, 2048, 16384], ("kv_tokens_per_second",)),
        ([1, 16, 16, 16], [128, 0, 0, 0], [0, 16, 128, 128], [0, 2048, 16384, 65536], ()),
        ([16], [0], [16], [2048], RATES[1:]),
    ],
)
def test_what_runs_cannot_tell_apart_is_named(
    steps: list[int], prefill: list[int], decode: list[int], kv: list[int], missing: tuple[str, ...]
) -> None:
    columns = (np.array(one, dtype=np.int64) for one in (steps, prefill, decode, kv))
    assert unmeasured_rates(MeasuredRuns(*columns, np.ones(len(steps)))) == missing


def test_a_fit_of_nothing_is_refused_also_with_a_default() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    with pytest.raises(ValueError, match="expected at least one run that ended in time"):
        fit_cost_model(
            MeasuredRuns(nothing, nothing, nothing, nothing, np.zeros(0)),
            kv_capacity_tokens=1, max_running_requests=1, default=CPU_DEFAULT,
        )  # fmt: skip
