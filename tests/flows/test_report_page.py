"""The HTML page: self-contained, the same bytes for the same figures, and complete."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from batchllm_flows.html_report.page import breakable, plan_page, report_page
from batchllm_flows.html_report.plots import as_steps, report_plots
from batchllm_flows.html_report.step_trace import StepTrace, read_step_trace
from batchllm_flows.report import ExecutedPlan, JobOutline, JobReport
from batchllm_operators.records import EngineSetting, OutputSamples, RowErrorExample, SampleAnswer
from batchllm_operators.specs.sampling import SamplingParameters
from batchllm_operators.store import Store
from batchllm_operators.work.layout import TRACE_FOLDER
from tests.flows.reports import a_plan, a_report, executed, plan_of_groups, trace_table

VOID = {"meta", "link", "br", "img", "wbr"}


class Page(HTMLParser):
    """Tags, headings and text of a page; fails on tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    @property
    def headings(self) -> list[str]:
        return [text for tag, text in self.texts if tag == "h2"]

    @property
    def text(self) -> str:
        return " ".join(text for tag, text in self.texts if tag != "style")


def a_trace(folder: Path) -> StepTrace:
    store = Store(str(folder))
    store.write_table(f"{TRACE_FOLDER}/engine-0.parquet", trace_table([0.5 * step for step in range(1, 200)]))
    trace, _ = read_step_trace(store, since=0.0)
    assert trace is not None
    return trace


def page_of(report: JobReport, *runs: ExecutedPlan, trace: StepTrace | None = None) -> str:
    return report_page(report, runs[-1].plan, report_plots(report, runs, trace), trace)


def test_a_page_needs_no_network_and_no_script_and_its_plots_are_xml(tmp_path: Path) -> None:
    run = executed(plan_of_groups(tmp_path / "work"))
    text = page_of(a_report(run), run, trace=a_trace(tmp_path))
    page = Page(text)
    assert page.tags.count("svg") == 6
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    without_names_of_formats = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert not re.search(r"https?:|url\((?!#)|@import", without_names_of_formats)
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(svg)  # noqa: S314 - our own


def test_the_same_figures_give_the_same_bytes(tmp_path: Path) -> None:
    run = executed(plan_of_groups(tmp_path / "work"))
    report, trace = a_report(run), a_trace(tmp_path)
    # More than twice: what differs in a layout differs now and then.
    assert len({page_of(report, run, trace=trace) for _ in range(5)}) == 1


def test_a_report_shows_outcome_saving_forecast_sharing_steps_and_settings(tmp_path: Path) -> None:
    run = executed(plan_of_groups(tmp_path / "work"))
    setting = EngineSetting(name="max_num_seqs", value="256", reason="memory is what binds")
    report = a_report(run, usd_per_engine_hour=3.6, error_rows={"invalid_row": 2}, engine_settings=[setting])
    page = Page(page_of(report, run, trace=a_trace(tmp_path)))
    assert page.headings == [
        "Outcome", "Saving", "Forecast against fact", "Where the time went", "What is shared", "Order",
        "Steps of the engine", "Engine settings",
    ]  # fmt: skip
    for words in (
        "invalid_row 2 rows", "optimum, nothing evicted", "one prefix a request", "computed prompt tokens",
        "output tokens, fact over forecast", "KV cache in use", "tokens per step", "199 steps", "0 preemptions",
        "memory is what binds", "2026-11-21 08:00:00 UTC", "price (fact: with loading)",
    ):  # fmt: skip
        assert words in page.text


def test_a_job_without_a_trace_says_so(tmp_path: Path) -> None:
    run = executed(a_plan())
    page = Page(page_of(a_report(run), run))
    assert "left no trace of their steps" in page.text
    assert "KV cache in use" not in page.text


def test_names_from_the_job_are_only_text() -> None:
    run = executed(a_plan())
    text = page_of(a_report(run, job_name="<script>alert(1)</script> & $x$"), run)
    assert "script" not in Page(text).tags
    assert "<script>alert(1)</script> & $x$" in Page(text).text


def test_a_plan_has_the_same_page_without_the_facts(tmp_path: Path) -> None:
    page = Page(plan_page(plan_of_groups(tmp_path), "nightly"))
    assert page.headings == ["Saving", "What is shared", "Order", "Forecast"]
    assert page.tags.count("svg") == 3
    assert "Nothing is computed yet" in page.text


@pytest.mark.parametrize("bundles", [0, 1])
def test_a_run_of_nothing_and_of_one_bundle_has_a_page(bundles: int) -> None:
    run = executed(a_plan(bundles, counts__prompt_tokens=0 if bundles == 0 else 1000))
    page = Page(page_of(a_report(run, prompt_tokens=0 if bundles == 0 else 1000), run))
    assert "What is shared" in page.headings
    assert ("was left to plan" in page.text) == (bundles == 0)


def test_a_bundle_without_expected_output_has_a_page() -> None:
    plan = a_plan(1)
    silent = plan.model_copy(
        update={"bundles": tuple(one.model_copy(update={"expected_output_tokens": 0}) for one in plan.bundles)}
    )
    run = executed(silent, output=0)
    assert "Forecast against fact" in Page(page_of(a_report(run), run)).headings


def test_importing_the_flows_loads_no_plotting() -> None:
    program = "import sys, batchllm_flows.flows, batchllm_operators.plan.task; print('matplotlib' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "False"


def some_samples(**changes: Any) -> OutputSamples:
    values: dict[str, Any] = {
        "truncated_rows": 1,
        "answers": (SampleAnswer(row_id="row-1", text="Paris is <b>the</b> capital | of France.\nTruly."),),
        "errors": {
            "invalid_row": (RowErrorExample(row_id="row-9", message="no prompt: {{ <script>alert(1)</script> }}"),)
        },
    }
    return OutputSamples(**values | changes)


def an_outline(**changes: Any) -> JobOutline:
    values: dict[str, Any] = {
        "model": "org/a.long.name-135M",
        "input_uri": "s3://bucket/in/",
        "input_objects": 1,
        "prompt_kind": "chat",
        "sampling": SamplingParameters(max_tokens=64, stop=("END",)),
    }
    return JobOutline(**values | changes)


def test_a_report_names_model_input_prompt_and_sampling_and_shows_samples_as_text() -> None:
    run = executed(a_plan())
    report = a_report(run, outline=an_outline(), samples=some_samples(), error_rows={"invalid_row": 1})
    text = page_of(report, run)
    page = Page(text)
    assert page.headings[:3] == ["Outcome", "Sample answers", "Sample errors"]
    for words in (
        "in/ , 1 object", "chat", "greedy, at most 64 tokens, stop at 'END'", "invalid_row 1 row",
        "1 answer ended at sampling.max_tokens (64)", "Paris is <b>the</b> capital | of France.",
        "no prompt: {{ <script>alert(1)</script> }}",
    ):  # fmt: skip
        assert words in page.text
    assert {"b", "script"} & set(page.tags) == {"b"}, "the tiles' own"
    assert "org/<wbr>a.<wbr>long.<wbr>name-135M" in text


def test_every_table_scrolls_in_its_own_box_and_every_plot_scales() -> None:
    run = executed(a_plan())
    report = a_report(
        run,
        outline=an_outline(),
        samples=some_samples(),
        engine_settings=[EngineSetting(name="block_size", value="32", reason="shares more")],
    )
    text = page_of(report, run)
    assert text.count("<table>") == text.count('<div class="scroll"><table>') == 4
    assert "min-width: 560px" not in text
    assert all('viewBox="' in svg for svg in re.findall(r"<svg[^>]*>", text))


def test_steps_are_drawn_as_steps_that_end_at_a_pause(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    # Two steps of half a second, a pause of a minute, one more step.
    store.write_table(f"{TRACE_FOLDER}/engine-0.parquet", trace_table([1.0, 1.5, 62.0], prefill_tokens=[10, 30, 20]))
    trace, _ = read_step_trace(store, since=0.0)
    assert trace is not None
    seconds, prefill = as_steps(trace, trace.prefill_tokens)
    drawn = ~np.isnan(prefill)
    assert prefill[drawn].tolist() == [10, 30, 30, 20, 20]
    assert (~drawn).sum() == 2, "a gap at the pause and one at the end"
    first, second, end_of_second, third, _ = seconds[drawn]
    assert end_of_second - second == pytest.approx(0.5, abs=0.01), "as long as a step takes"
    assert second - first == pytest.approx(0.5, abs=0.02)
    assert third > 60


@pytest.mark.parametrize(
    ("name", "html"),
    [
        ("batchllm.vllm_plugin.Scheduler", "batchllm.<wbr>vllm_plugin.<wbr>Scheduler"),
        ("s3://b/<x>", "s3:/<wbr>/<wbr>b/<wbr>&lt;x&gt;"),
        ("plain", "plain"),
    ],
)
def test_a_long_name_may_break_behind_its_dots_and_slashes(name: str, html: str) -> None:
    assert str(breakable(name)) == html


def test_damaged_objects_that_were_set_aside_are_named() -> None:
    run = executed(a_plan())
    page = Page(page_of(a_report(run, set_aside=("quarantine/results/part-1.parquet",)), run))
    assert "set aside as damaged quarantine/ results/ part-1. parquet" in page.text
