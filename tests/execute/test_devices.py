from __future__ import annotations

from pathlib import Path

import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.machine.devices import DeviceShare, device_shares, gpu_model, gpus_of_machine


def test_the_visible_gpus_are_taken_from_the_environment_before_the_driver(tmp_path: Path) -> None:
    driver = tmp_path / "gpus"
    assert gpus_of_machine({}, driver) == []
    for address in ("0000:01:00.0", "0000:02:00.0"):
        (driver / address).mkdir(parents=True)
    assert gpus_of_machine({}, driver) == ["0", "1"]
    assert gpus_of_machine({"CUDA_VISIBLE_DEVICES": "3, GPU-abc"}, driver) == ["3", "GPU-abc"]
    assert gpus_of_machine({"CUDA_VISIBLE_DEVICES": ""}, driver) == []


def test_the_driver_tells_the_name_of_the_gpu(tmp_path: Path) -> None:
    assert gpu_model(tmp_path / "none") is None
    device = tmp_path / "gpus" / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 18\n")
    assert gpu_model(tmp_path / "gpus") == "NVIDIA H100 80GB HBM3"


def test_each_engine_gets_gpus_of_its_own() -> None:
    shares = device_shares(2, 2, ["4", "5", "6", "7"], [0, 1])
    assert shares == [DeviceShare(gpus=("4", "5")), DeviceShare(gpus=("6", "7"))]


def test_too_few_gpus_are_refused_with_the_numbers() -> None:
    with pytest.raises(TerminalError, match="2 engines of 2 GPUs need 4 GPUs, this machine has 3"):
        device_shares(2, 2, ["0", "1", "2"], [0, 1])


def test_without_gpus_the_engines_share_the_cores() -> None:
    assert device_shares(1, 1, [], [0, 1, 2]) == [DeviceShare()]
    assert device_shares(2, 1, [], [0, 1, 2, 3, 4]) == [DeviceShare(cores=(0, 1)), DeviceShare(cores=(2, 3, 4))]


def test_more_engines_than_cores_are_not_bound_to_any() -> None:
    assert device_shares(3, 1, [], [0, 1]) == [DeviceShare()] * 3
