"""Pages and artifacts of plans and runs: what a person looks at. A fault here fails no job whose work is done.

Drawing loads matplotlib, and showing loads Prefect: both are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread

from batchllm_flows.report import ExecutedPlan, JobReport
from batchllm_flows.report_text import report_markdown
from batchllm_operators.records import PlanSummary
from batchllm_operators.store import Store
from batchllm_operators.svg import markdown_image
from batchllm_operators.wording import artifact_slug
from batchllm_operators.work.layout import PLAN_PAGE, REPORT_PAGE

Warn = Callable[..., None]
"""Takes a warning, as `logging.Logger.warning`."""


def publish_plan(work: Store, planned: PlanSummary, job_name: str, warn: Warn) -> PlanSummary:
    """Write the page of a plan; returns the plan with the place of its page, without where it cannot be written."""
    page_uri = None
    with _only_shown(warn):
        from batchllm_flows.html_report.page import plan_page

        work.write_bytes(PLAN_PAGE, plan_page(planned, job_name).encode())
        page_uri = work.uri_of(PLAN_PAGE)
    return planned.model_copy(update={"page_uri": page_uri})


def publish_run(work: Store, report: JobReport, executed: Sequence[ExecutedPlan], warn: Warn) -> None:
    """Write the page of a run, and show its report with the plots of its facts as an artifact of the flow run."""
    with _only_shown(warn):
        _show(report, _write_page(work, report, executed))


def publish_earlier_run(report: JobReport, warn: Warn) -> None:
    """Show the report of the run that completed the job as an artifact of this flow run."""
    with _only_shown(warn):
        _show(report)


def load_page_ahead() -> None:
    """Begin to load what drawing a page needs, which there is time for while engines work."""
    Thread(target=_load_page, name="report-page", daemon=True).start()


def _load_page() -> None:
    import batchllm_flows.html_report.page  # noqa: F401 - imported for `_write_page`


def _write_page(work: Store, report: JobReport, executed: Sequence[ExecutedPlan]) -> list[str]:
    """Write the page of a run; returns the plots of its facts, as lines of Markdown."""
    from batchllm_flows.html_report.attention_trace import read_attention_trace
    from batchllm_flows.html_report.page import report_page
    from batchllm_flows.html_report.plots import report_plots
    from batchllm_flows.html_report.step_trace import read_step_trace

    since = report.started.timestamp()
    trace, notes = read_step_trace(work, since=since)
    attention, attention_notes = read_attention_trace(work, since=since)
    plots = report_plots(report, executed, trace)
    page = report_page(report, executed[-1].plan, plots, trace, attention, [*notes, *attention_notes])
    work.write_bytes(REPORT_PAGE, page.encode())
    return [
        *markdown_image("Savings", plots.saving),
        *markdown_image("Each bundle against its forecast", plots.bundles),
        *markdown_image("Steps of the engines", plots.engine_steps),
    ]


def _show(report: JobReport, images: Sequence[str] = ()) -> None:
    from prefect.artifacts import create_markdown_artifact

    create_markdown_artifact(
        "\n".join([report_markdown(report), *images]),
        key=f"{artifact_slug(report.job_name)}-report",
        description="Report of the run",
    )


@contextmanager
def _only_shown(warn: Warn) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        warn("a report could not be shown, which changes no result: %s: %s", type(error).__name__, error, exc_info=True)
