"""What a report says: forecast against fact, what belongs to this run, and reports that cannot be read."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from markdown_it import MarkdownIt

from batchllm_flows.job import BatchJob
from batchllm_flows.report import JobOutline, read_report, read_report_page
from batchllm_flows.report_text import outline_rows, report_markdown
from batchllm_operators.errors import TerminalError
from batchllm_operators.records import EngineSetting, Manifest, OutputSamples, RowErrorExample, SampleAnswer
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.store import Store
from batchllm_operators.work.layout import MANIFEST_FILE, REPORT_FILE
from tests.flows.jobs import job_values
from tests.flows.reports import a_plan, a_report, executed


def test_every_forecast_stands_beside_its_fact() -> None:
    forecast = a_report(executed(a_plan()), usd_per_engine_hour=3.6).forecast
    assert (forecast.saving.expected, forecast.saving.actual) == (0.6, 0.5)
    assert (forecast.computed_prompt_tokens.expected, forecast.computed_prompt_tokens.actual) == (800, 1000)
    assert (forecast.output_tokens.expected, forecast.output_tokens.actual) == (100, 80)
    assert forecast.output_tokens.ratio == 0.8
    seconds = forecast.execute_seconds
    assert (seconds.expected, seconds.actual) == (4.0, 6.0), "10 s, of which 4 s were loading"
    assert forecast.usd is not None
    assert (forecast.usd.expected, forecast.usd.actual) == (0.02, 0.01), "10 s of one engine, loading included"


def test_a_pilots_plan_counts_in_the_forecast() -> None:
    pilot = executed(a_plan(1, pilot=True), computed=500)
    # The plan after a pilot knows what it computed: 500 tokens, where 400 were expected.
    rest = executed(
        a_plan(1, counts__prompt_tokens=2000, counts__done_requests=10, saving__planned=1 - (500 + 400) / 2000)
    )
    report = a_report(pilot, rest)
    assert report.forecast.saving.expected == pytest.approx(1 - (400 + 400) / 2000)
    assert report.forecast.execute_seconds.expected == 4.0
    assert report.forecast.computed_prompt_tokens.expected == 800
    assert (report.requests, report.computed_requests, report.bundles) == (20, 20, 2)


def test_without_a_price_there_is_none_and_without_a_forecast_there_is_no_ratio() -> None:
    report = a_report(executed(a_plan(0, counts__prompt_tokens=2000)))
    assert report.forecast.usd is None
    assert report.forecast.output_tokens.ratio is None
    assert report.tokens_per_second == 0.0
    assert "price" not in report_markdown(report)


def test_a_resumed_run_says_what_belongs_to_it() -> None:
    report = a_report(executed(a_plan(1, counts__prompt_tokens=2000, counts__done_requests=10)))
    assert (report.requests, report.computed_requests) == (20, 10)
    text = report_markdown(report)
    assert "10 of 20 distinct requests computed in this run" in text
    assert "answered by earlier runs" in text
    assert report.tokens_per_second == (1000 + 40) / 6.0, "of this run, not of the whole job"
    assert "earlier runs" not in report_markdown(a_report())


def test_the_markdown_shows_forecast_fact_and_settings() -> None:
    setting = EngineSetting(name="block_size", value="32", reason="shares more")
    text = report_markdown(a_report(usd_per_engine_hour=3.6, engine_settings=[setting]))
    assert "| computed prompt tokens | 800 | 1,000 | 1.25 |" in text
    assert "| execute, engines loaded | 4.0 s | 6.0 s | 1.50 |" in text
    assert "| price (fact: with loading) | $0.0200 | $0.0100 | 0.50 |" in text
    assert "| `block_size` | 32 | shares more |" in text


def test_the_report_names_the_damaged_objects_that_were_set_aside() -> None:
    assert "quarantine" not in report_markdown(a_report())
    text = report_markdown(a_report(set_aside=["quarantine/results/part-1.parquet"]))
    assert "set aside and made again:\n\n- `quarantine/results/part-1.parquet`" in text


def complete_output(folder: Path) -> Store:
    """A complete output whose work folder holds no report."""
    work = Store(str(folder / "work"))
    manifest = Manifest(
        format_version=1, job_id="0123abcd", job_name="reviews", work_uri=work.uri, rows=0, error_rows={}, files=(),
        layout=SinkSpec(uri=str(folder)).layout,
        prompt_tokens=0, cached_tokens=0, computed_prompt_tokens=0, completion_tokens=0,
    )  # fmt: skip
    Store(str(folder)).write_bytes(MANIFEST_FILE, manifest.model_dump_json().encode())
    return work


def test_a_report_is_read_back(tmp_path: Path) -> None:
    report = a_report(usd_per_engine_hour=1.0)
    complete_output(tmp_path).write_bytes(REPORT_FILE, report.model_dump_json().encode())
    assert read_report(SinkSpec(uri=str(tmp_path))) == report


@pytest.mark.parametrize("content", [b"not JSON", b"{}", orjson.dumps({"job_id": "a", "of_the_future": 1})])
def test_a_report_of_another_version_is_named_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    complete_output(tmp_path).write_bytes(REPORT_FILE, content)
    with pytest.raises(TerminalError, match=r"report\.json is not as .* delete it and run the job again.*/work/report"):
        read_report(SinkSpec(uri=str(tmp_path)))


def test_a_manifest_of_another_version_and_a_missing_page_are_named(tmp_path: Path) -> None:
    complete_output(tmp_path)
    with pytest.raises(TerminalError, match=r"no report page.*/work/report\.html"):
        read_report_page(SinkSpec(uri=str(tmp_path)))
    Store(str(tmp_path)).write_bytes(MANIFEST_FILE, b"[]")
    with pytest.raises(TerminalError, match=r"_manifest\.json is not as"):
        read_report(SinkSpec(uri=str(tmp_path)))


def test_texts_of_rows_and_names_are_no_markdown_in_the_report() -> None:
    samples = OutputSamples(
        truncated_rows=2,
        answers=(SampleAnswer(row_id="a|b", text="**bold** <script>alert(1)</script> | cell\nnext"),),
        errors={"invalid_row": (RowErrorExample(row_id="r", message="[link](http://x) `code`"),)},
    )
    report = a_report(job_name="*stars* <b>", samples=samples, error_rows={"invalid_row": 1}, rows=1)
    page = MarkdownIt("js-default").render(report_markdown(report))
    for shown in (
        "*stars* &lt;b&gt;: 1 row, 1 without an answer", "2 answers ended at sampling.max_tokens", "<td>a|b</td>",
        "<td>**bold** &lt;script&gt;alert(1)&lt;/script&gt; | cell next</td>", "<td>[link](http://x) `code`</td>",
    ):  # fmt: skip
        assert shown in page


def test_the_outline_names_what_was_asked() -> None:
    values = job_values("s3://bucket/in/", "/out", "org/model", sampling={"temperature": 0.7, "top_p": 0.9, "seed": 3})
    values["model"]["revision"] = "v2"
    outline = JobOutline.of(BatchJob.model_validate(values), input_objects=3)
    assert outline_rows(outline) == [
        ("model", "org/model at v2"),
        ("input", "s3://bucket/in/, 3 objects"),
        ("prompt", "chat"),
        ("sampling", "temperature 0.7, top_p 0.9, seed 3, at most 256 tokens"),
    ]
