"""How many steps shared prefixes in attention, and where the page says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from batchllm_flows.html_report.attention_trace import AttentionTrace, read_attention_trace
from batchllm_flows.html_report.page import report_page
from batchllm_flows.html_report.plots import report_plots
from batchllm_operators.store import Store
from batchllm_operators.work.traces import ATTENTION_TRACE_SCHEMA
from tests.flows.reports import a_plan, a_report, executed


def steps(*changes: dict[str, Any]) -> pa.Table:
    usual = {
        "time_s": 100.0, "rank": 0, "requests": 4, "query_tokens": 4, "share": True, "reason": "it pays",
        "stock_us": 2.0, "shared_us": 1.0,
    }  # fmt: skip
    return pa.Table.from_pylist([usual | change for change in changes], schema=ATTENTION_TRACE_SCHEMA)


def test_steps_of_one_rank_and_of_this_run_are_counted(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    unseen = {"share": False, "reason": "not looked at", "stock_us": None, "shared_us": None}
    store.write_table("attention_trace/one.parquet", steps({}, {"rank": 1}, {"share": False}, unseen))
    store.write_table("attention_trace/two.parquet", steps({}, {"time_s": 10.0}))
    assert read_attention_trace(store, since=50.0) == (AttentionTrace(steps=4, shared=2, looked_at=3), [])


def test_a_run_without_prefix_shared_attention_has_none(tmp_path: Path) -> None:
    assert read_attention_trace(Store(str(tmp_path)), since=0.0) == (None, [])


def test_a_damaged_file_is_named_and_the_others_count(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("attention_trace/damaged.parquet", b"PAR1 but not really")
    store.write_table("attention_trace/whole.parquet", steps({}))
    trace, unreadable = read_attention_trace(store, since=0.0)
    assert trace == AttentionTrace(steps=1, shared=1, looked_at=1)
    assert "damaged.parquet" in unreadable[0]


def test_the_page_of_a_run_says_how_many_steps_shared() -> None:
    run = executed(a_plan())
    report = a_report(run)
    plots = report_plots(report, [run], None)
    page = report_page(report, run.plan, plots, None, AttentionTrace(steps=2000, shared=1200, looked_at=1500))
    said = "read shared prefixes once for all in 1,200 of 2,000 steps; the gain was reckoned for 1,500 of them"
    assert said in page
    assert "shared prefixes once for all" not in report_page(report, run.plan, plots, None)
