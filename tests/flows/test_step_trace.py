"""Steps of the engines, drawn together for a plot."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm_flows.html_report.step_trace import MOST_POINTS, read_step_trace
from batchllm_operators.store import Store
from tests.flows.reports import TRACE_TYPES, trace_table

moments = st.lists(st.floats(1e9, 1e9 + 1e6).map(lambda second: round(second, 3)), min_size=1, max_size=50)


@given(st.lists(moments, min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_nothing_is_lost_and_points_stay_few(files: list[list[float]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, times in enumerate(files):
            prefill = list(range(len(times)))
            Store(folder).write_table(f"trace/{number}.parquet", trace_table(times, prefill_tokens=prefill))
        trace, unreadable = read_step_trace(Store(folder), since=0.0)
    assert unreadable == []
    assert trace is not None
    assert trace.steps == sum(map(len, files))
    assert trace.tokens == sum(10 * len(times) + sum(range(len(times))) for times in files)
    assert trace.step_seconds == pytest.approx(0.5 * trace.steps)
    assert len(trace.seconds) <= MOST_POINTS
    assert trace.seconds[0] == 0
    assert (np.diff(trace.seconds) >= trace.point_seconds).all()


def test_each_point_is_the_mean_of_its_steps_and_the_most_of_the_cache(tmp_path: Path) -> None:
    table = trace_table(
        [100.0, 100.001, 107.0], prefill_tokens=[50, 150, 7], kv_tokens_used=[200, 600, 100], preempted=[0, 1, 1]
    )
    Store(str(tmp_path)).write_table("trace/one.parquet", table)
    trace, _ = read_step_trace(Store(str(tmp_path)), since=0.0)
    assert trace is not None
    assert trace.prefill_tokens.tolist() == [100, 7]
    assert trace.kv_use.tolist() == pytest.approx([0.4, 0.1])
    assert trace.kv_most.tolist() == [0.6, 0.1]
    assert trace.preempted == 2


def test_steps_of_earlier_runs_are_left_out(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_table("trace/earlier.parquet", trace_table([10.0, 11.0]))
    assert read_step_trace(store, since=20.0) == (None, [])
    store.write_table("trace/this-run.parquet", trace_table([19.9, 20.1]))
    trace, _ = read_step_trace(store, since=20.0)
    assert trace is not None
    assert trace.steps == 1


def test_a_job_without_a_trace_has_none(tmp_path: Path) -> None:
    assert read_step_trace(Store(str(tmp_path)), since=0.0) == (None, [])


def test_a_damaged_file_is_named_and_the_others_count(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("trace/damaged.parquet", b"PAR1 but not really")
    store.write_table("trace/other.parquet", pa.table({"something": [1]}))
    store.write_table("trace/whole.parquet", trace_table([1.0]))
    trace, unreadable = read_step_trace(store, since=0.0)
    assert trace is not None
    assert trace.steps == 1
    assert ["damaged.parquet" in unreadable[0], "other.parquet" in unreadable[1]] == [True, True]


def test_a_long_trace_is_read_in_little_memory(tmp_path: Path) -> None:
    steps = 400_000
    values = {name: np.ones(steps) for name in TRACE_TYPES} | {"time_s": np.arange(1, steps + 1) * 0.02}
    table = pa.table({name: pa.array(values[name]).cast(kind) for name, kind in TRACE_TYPES.items()})
    Store(str(tmp_path)).write_table("trace/long.parquet", table)
    del table, values
    tracemalloc.start()
    trace, _ = read_step_trace(Store(str(tmp_path)), since=0.0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert trace is not None
    assert trace.steps == steps
    assert most < 9 * 8 * steps, "less than its columns as numbers"
