"""Calibrations that outlive a job."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from batchllm_operators.cost import CPU_DEFAULT, Calibration
from batchllm_operators.execute.calibration_cache import CalibrationCache
from batchllm_operators.records import BundleResult
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.store import Store

MODEL = ModelSpec(id="m", engine_args={"max_num_seqs": 8})


def cache(store: Store, model: ModelSpec = MODEL, block_size: int = 32, gpus_per_engine: int = 1) -> CalibrationCache:
    return CalibrationCache(store, model, block_size=block_size, gpus_per_engine=gpus_per_engine)


def calibration(device: str, measured_at: str) -> Calibration:
    return Calibration(rates=CPU_DEFAULT, device=device, measured_at=measured_at, seconds=3.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "calibrations"))


def test_nothing_is_known_at_first(store: Store) -> None:
    assert cache(store).latest() is None


def test_the_newest_calibration_of_any_device_counts(store: Store, bucket: str) -> None:
    for place in (store, Store(f"{bucket}/calibrations")):
        newest = calibration("1 x B", "2026-02-02 00:00:00")
        for one in (calibration("1 x A", "2026-01-01 00:00:00"), newest, calibration("1 x C", "2025-12-31 23:59:59")):
            cache(place).keep(one)
        assert cache(place).latest() == newest
        assert len(place.names()) == 3


def test_a_device_has_one_calibration(store: Store) -> None:
    cache(store).keep(calibration("1 x A", "2026-01-01 00:00:00"))
    again = calibration("1 x A", "2026-03-01 00:00:00")
    cache(store).keep(again)
    assert cache(store).latest() == again
    assert len(store.names()) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"model": ModelSpec(id="other", engine_args={"max_num_seqs": 8})},
        {"model": MODEL.model_copy(update={"revision": "v2"})},
        {"model": MODEL.model_copy(update={"dtype": "float16"})},
        {"model": MODEL.model_copy(update={"engine_args": {"max_num_seqs": 16}})},
        {"block_size": 64},
        {"gpus_per_engine": 2},
    ],
    ids=str,
)
def test_another_setting_of_the_engine_has_calibrations_of_its_own(store: Store, other: dict[str, object]) -> None:
    cache(store).keep(calibration("1 x A", "2026-01-01 00:00:00"))
    assert cache(store, **other).latest() is None


def test_an_object_that_is_no_calibration_counts_for_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    cache(store).keep(calibration("1 x A", "2026-01-01 00:00:00"))
    (name,) = store.names()
    store.write_bytes(name, b'{"rates": 1}')
    with caplog.at_level(logging.WARNING):
        assert cache(store).latest() is None
    assert name in caplog.text


def test_another_dtype_or_another_version_does_not_take_the_place_of_a_calibration(store: Store) -> None:
    one = calibration("1 x A", "2026-01-01 00:00:00")
    for other in ({}, {"dtype": "float32"}, {"dtype": "bfloat16"}, {"versions": {"vllm": "0.32.0"}}):
        cache(store).keep(one.model_copy(update=other))
    assert len(store.names()) == 4


def test_a_calibration_of_an_earlier_version_is_read(store: Store) -> None:
    kept = calibration("1 x A", "2026-01-01 00:00:00")
    cache(store).keep(kept)
    (name,) = store.names()
    store.write_bytes(name, kept.model_dump_json(include={"rates", "device", "measured_at", "seconds"}).encode())
    assert cache(store).latest() == kept


# By the rates 40,000 computed prompt tokens take 7.3 s, and 6,000 generated ones 5.3 s.
FACTS = {"bundle": "b", "requests": 60, "errors": 0, "prompt_tokens": 60_000, "cached_tokens": 20_000}
FACTS |= {"completion_tokens": 6_000, "parts": (), "load_seconds": 0.0}


@pytest.mark.parametrize(
    ("seconds", "kept"),
    [(11.0, True), (19.0, True), (4.0, False), (60.0, False)],
    ids=["as forecast", "a little slower", "much faster", "much slower"],
)
def test_a_calibration_that_the_facts_contradict_by_more_than_two_times_is_measured_again(
    seconds: float, kept: bool, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    held = calibration("1 x A", "2026-01-01 00:00:00")
    cache(store).keep(held)
    other = calibration("1 x B", "2025-01-01 00:00:00")
    cache(store).keep(other)
    with caplog.at_level(logging.WARNING):
        cache(store).hold_against(held, [BundleResult.model_validate(FACTS | {"seconds": seconds})])
    assert cache(store).latest() == (held if kept else other)
    assert ("the next run measures again" in caplog.text) is not kept


def test_a_few_seconds_of_work_contradict_nothing(store: Store) -> None:
    held = calibration("1 x A", "2026-01-01 00:00:00")
    cache(store).keep(held)
    few = FACTS | {"prompt_tokens": 600, "cached_tokens": 0, "completion_tokens": 60, "seconds": 5.0}
    cache(store).hold_against(held, [BundleResult.model_validate(few)])
    cache(store).hold_against(held, [])
    assert cache(store).latest() == held
