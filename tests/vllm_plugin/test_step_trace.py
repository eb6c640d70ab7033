"""The step trace, written and read at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchllm_kernels.vllm_plugin.step_trace import STEP, StepTraceWriter, read_steps

COUNTS = {"prefill_tokens": 7, "decode_tokens": 3, "running": 4, "waiting": 2}
LOAD = {"kv_tokens_used": 2**40, "kv_tokens_capacity": 2**41, "preempted": 1}


def write(trace: StepTraceWriter, **changed: int) -> None:
    trace.write(**{**COUNTS, **LOAD, **changed})


def test_every_step_reads_back_as_written(tmp_path: Path) -> None:
    trace = StepTraceWriter(tmp_path / "trace")
    write(trace)
    (step,) = read_steps(tmp_path / "trace")
    assert {name: step[name] for name in (*COUNTS, *LOAD)} == {**COUNTS, **LOAD}


def test_steps_are_there_as_soon_as_they_are_written_and_can_be_read_from_any_on(tmp_path: Path) -> None:
    trace = StepTraceWriter(tmp_path / "trace")
    read: list[int] = []
    for number in range(5):
        write(trace, running=number)
        read += read_steps(tmp_path / "trace", first=len(read))["running"].tolist()
        assert read == list(range(number + 1))
    assert len(read_steps(tmp_path / "trace", first=5)) == 0


def test_half_a_step_at_the_end_of_the_file_is_not_read(tmp_path: Path) -> None:
    write(StepTraceWriter(tmp_path / "trace"), running=1)
    whole = (tmp_path / "trace").read_bytes()
    (tmp_path / "trace").write_bytes(whole + whole[: STEP.itemsize // 2])
    assert read_steps(tmp_path / "trace")["running"].tolist() == [1]


def test_a_trace_that_nobody_has_begun_has_no_steps(tmp_path: Path) -> None:
    assert len(read_steps(tmp_path / "missing")) == 0


def test_a_second_writer_goes_on_with_the_file(tmp_path: Path) -> None:
    for running in (1, 2):
        write(StepTraceWriter(tmp_path / "trace"), running=running)
    assert read_steps(tmp_path / "trace")["running"].tolist() == [1, 2]


def test_seconds_of_steps_are_counted_between_them_but_not_over_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 100.5, 107.0, 107.25])
    monkeypatch.setattr("time.time", lambda: next(clock))
    trace = StepTraceWriter(tmp_path / "trace")
    write(trace)
    write(trace)
    trace.pause()
    write(trace)
    write(trace)
    steps = read_steps(tmp_path / "trace")
    assert steps["time_s"].tolist() == [100.0, 100.5, 107.0, 107.25]
    assert steps["step_seconds"].tolist() == [0.0, 0.5, 0.0, 0.25]
