"""Deaths by memory and by GPUs are told from others, with what can be done about them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from batchllm_operators.errors import TerminalError, TransientError
from batchllm_operators.execute.backends import engine_subprocess
from batchllm_operators.execute.backends.death_causes import (
    LOST_GPU,
    OUT_OF_GPU_MEMORY,
    OUT_OF_MEMORY,
    cause_of_death,
)
from batchllm_operators.execute.messages import Load
from batchllm_operators.machine.memory_kills import memory_kills
from tests.execute.conftest import StartedEngine

MakeEngine = Callable[..., StartedEngine]

GPU_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 79 GiB"
GPU_FAILED = "RuntimeError: CUDA error: unspecified launch failure"


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (GPU_MEMORY, OUT_OF_GPU_MEMORY),
        (GPU_FAILED, LOST_GPU),
        ("NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.", LOST_GPU),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", LOST_GPU),
        ("torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", LOST_GPU),
        ("ValueError: CUDA error: invalid argument", ""),
        ("the prompt speaks of taxids and memory", ""),
    ],
)
def test_the_log_tells_of_gpus(line: str, cause: str) -> None:
    assert cause_of_death(["before", line, "after"], 3, 3) == cause
    assert cause_of_death(["before", line], 3, 4) == OUT_OF_MEMORY
    assert cause_of_death([line], None, 4) == cause


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.events": "low 0\noom 3\noom_kill 2\n"}, 2),
        (
            {
                "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/x\n0::/\n",
                "sys/fs/cgroup/memory/x/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n",
                "proc/vmstat": "oom_kill 9\n",
            },
            5,
        ),
        ({"proc/self/cgroup": "0::/\n", "proc/vmstat": "pgfault 1\noom_kill 9\n"}, 9),
        ({}, None),
    ],
)
def test_kills_are_counted_where_the_kernel_counts_them(
    tmp_path: Path, files: dict[str, str], kills: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_kills(tmp_path) == kills


def test_this_machine_counts_kills() -> None:
    count = memory_kills()
    assert count is not None
    assert count >= 0


def test_a_model_that_does_not_fit_a_gpu_says_what_to_lower(
    make_engine: MakeEngine, told_engine: Callable[..., str], load_command: Load
) -> None:
    engine = make_engine(python=told_engine(load_fault="Engine core initialization failed", prints=GPU_MEMORY))
    with pytest.raises((TerminalError, TransientError)) as caught:
        engine.driver.load(load_command)
    assert "Engine core initialization failed" in str(caught.value)
    assert OUT_OF_GPU_MEMORY in str(caught.value)


def test_an_engine_that_the_kernel_kills_for_memory_says_what_to_lower(
    make_engine: MakeEngine, told_engine: Callable[..., str], load_command: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The machine of the tests cannot be made to run out of memory.
    kills = itertools.count()
    monkeypatch.setattr(engine_subprocess, "memory_kills", lambda: next(kills))
    engine = make_engine(python=told_engine(killed_while_loading=True))
    with pytest.raises(TransientError, match=r"killed by signal 9 \(the kernel killed a process for lack of memory"):
        engine.driver.load(load_command)
