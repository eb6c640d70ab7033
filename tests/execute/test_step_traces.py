"""Steps of the scheduler, and of attention, on their way to the work folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchllm_kernels.vllm_plugin.attention_trace import AttentionTraceWriter
from batchllm_kernels.vllm_plugin.step_trace import STEP, StepTraceWriter
from batchllm_operators.errors import BatchLLMError
from batchllm_operators.execute.step_traces import StepTraces
from batchllm_operators.store import Store
from batchllm_operators.work.layout import ATTENTION_TRACE_FOLDER, TRACE_FOLDER
from batchllm_operators.work.traces import ATTENTION_TRACE_SCHEMA


@pytest.fixture
def work(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "work"))


def make_steps(writer: StepTraceWriter, running: list[int]) -> None:
    for requests in running:
        writer.write(
            prefill_tokens=7,
            decode_tokens=requests,
            running=requests,
            waiting=0,
            kv_tokens_used=32,
            kv_tokens_capacity=64,
            preempted=0,
        )


def running_by_object(work: Store) -> list[list[int]]:
    tables = []
    for name in sorted(work.names(TRACE_FOLDER)):
        with work.parquet(name) as parquet:
            tables.append(parquet.read(columns=["running"])["running"].to_pylist())
    return tables


def test_each_bundle_gets_the_steps_since_the_one_before(tmp_path: Path, work: Store) -> None:
    file = tmp_path / "steps"
    writer, traces = StepTraceWriter(file), StepTraces(file, tmp_path / "attention")
    make_steps(writer, [1, 2])
    traces.write(work, "plan/bundle-00000.parquet")
    make_steps(writer, [3])
    traces.write(work, "plan/bundle-00001.parquet")
    assert running_by_object(work) == [[1, 2], [3]]
    with work.parquet(sorted(work.names(TRACE_FOLDER))[0]) as parquet:
        assert parquet.schema_arrow.names == list(STEP.names or ())


def test_steps_of_a_calibration_are_left_out(tmp_path: Path, work: Store) -> None:
    file = tmp_path / "steps"
    writer, traces = StepTraceWriter(file), StepTraces(file, tmp_path / "attention")
    make_steps(writer, [1, 2])
    traces.skip()
    make_steps(writer, [3])
    traces.write(work, "plan/bundle-00000.parquet")
    assert running_by_object(work) == [[3]]


def test_no_object_is_written_where_there_are_no_steps(tmp_path: Path, work: Store) -> None:
    StepTraces(tmp_path / "steps", tmp_path / "attention").write(work, "plan/bundle-00000.parquet")
    assert work.names() == []


def test_steps_that_could_not_be_written_are_written_the_next_time(tmp_path: Path, work: Store) -> None:
    file = tmp_path / "steps"
    writer, traces = StepTraceWriter(file), StepTraces(file, tmp_path / "attention")
    make_steps(writer, [1])
    in_the_way = tmp_path / "work"
    in_the_way.write_text("a file where the folder should be")
    with pytest.raises(BatchLLMError):
        traces.write(work, "plan/bundle-00000.parquet")
    in_the_way.unlink()
    make_steps(writer, [2])
    traces.write(work, "plan/bundle-00000.parquet")
    assert running_by_object(work) == [[1, 2]]


def test_each_bundle_gets_what_attention_decided_since_the_one_before(tmp_path: Path, work: Store) -> None:
    file = tmp_path / "attention"
    writer, traces = AttentionTraceWriter(file, rank=0), StepTraces(tmp_path / "steps", file)
    writer.write(requests=1, query_tokens=9, decision=None)
    traces.skip()
    for number in (2, 3):
        writer.write(requests=number, query_tokens=number, decision=None)
        traces.write(work, f"plan/bundle-{number:05d}.parquet")
    tables = []
    for name in work.names(ATTENTION_TRACE_FOLDER):
        with work.parquet(name) as parquet:
            tables.append(parquet.read())
    assert [table["requests"].to_pylist() for table in tables] == [[2], [3]]
    assert {table.schema for table in tables} == {ATTENTION_TRACE_SCHEMA}
