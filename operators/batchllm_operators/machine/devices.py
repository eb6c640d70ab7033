"""Which part of the machine an engine gets: GPUs where there are any, else a share of the CPU cores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from batchllm_operators.errors import TerminalError
from batchllm_operators.records import Record
from batchllm_operators.wording import counted

_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")


class DeviceShare(Record):
    """The devices of one engine process."""

    gpus: tuple[str, ...] = ()
    """Values for CUDA_VISIBLE_DEVICES; empty: leave the variable alone."""
    cores: tuple[int, ...] = ()
    """CPU cores to run on; empty: all."""


def gpus_of_machine(environment: Mapping[str, str] = os.environ, driver: Path = _NVIDIA_GPUS) -> list[str]:
    """The GPUs this process may use, by the names that CUDA_VISIBLE_DEVICES takes.

    Read from CUDA_VISIBLE_DEVICES where it is set, else from the driver; no CUDA context is made for it.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    return [str(index) for index, _ in enumerate(sorted(driver.iterdir()))] if driver.is_dir() else []


def gpu_model(driver: Path = _NVIDIA_GPUS) -> str | None:
    """The name of the machine's first GPU, as `NVIDIA H100 80GB HBM3`; None where the driver tells none.

    Read from the driver's files, as CUDA names it too.
    """
    for information in sorted(driver.glob("*/information")):
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "Model":
                return value.strip()
    return None


def device_shares(engines: int, gpus_per_engine: int, gpus: Sequence[str], cores: Sequence[int]) -> list[DeviceShare]:
    """What each of several engines gets.

    Args:
        engines: engine processes on this machine.
        gpus_per_engine: GPUs of one engine.
        gpus: the GPUs of the machine; none: the engines share the cores.
        cores: the CPU cores this process may use.

    Raises:
        TerminalError: there are GPUs, but not enough for all engines.
    """
    if gpus:
        if len(gpus) < engines * gpus_per_engine:
            raise TerminalError(
                f"execution: {counted(engines, 'engine')} of {counted(gpus_per_engine, 'GPU')} need "
                f"{counted(engines * gpus_per_engine, 'GPU')}, this machine has {len(gpus)}"
            )
        return [
            DeviceShare(gpus=tuple(gpus[first : first + gpus_per_engine]))
            for first in range(0, engines * gpus_per_engine, gpus_per_engine)
        ]
    if engines == 1 or len(cores) < engines:
        return [DeviceShare()] * engines
    # Neighbours together: they share caches and memory nodes.
    edges = [round(index * len(cores) / engines) for index in range(engines + 1)]
    return [DeviceShare(cores=tuple(cores[low:high])) for low, high in pairwise(edges)]
