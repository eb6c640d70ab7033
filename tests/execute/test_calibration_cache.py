"""Calibrations that outlive a job."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from batchllm_operators.execute.calibration_cache import CalibrationCache
from batchllm_operators.execute.spec import ModelSpec
from batchllm_operators.plan.cost import CPU_DEFAULT, Calibration
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
