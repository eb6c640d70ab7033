"""The HTML page: self-contained, the same bytes for the same figures, and complete."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from batchllm_flows.html_report.page import plan_page, report_page
from batchllm_flows.html_report.plots import report_plots
from batchllm_flows.html_report.step_trace import StepTrace, read_step_trace
from batchllm_flows.report import ExecutedPlan, JobReport
from batchllm_operators.records import TRACE_FOLDER, EngineSetting
from batchllm_operators.store import Store
from tests.flows.reports import a_plan, a_report, executed, plan_of_groups, trace_table

VOID = {"meta", "link", "br", "img"}


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
    run = executed(a_plan(bundles, prompt_tokens=0 if bundles == 0 else 1000))
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
