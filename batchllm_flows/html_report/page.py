"""The page of a job: from records and plots to one self-contained HTML document."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import jinja2
from markupsafe import Markup, escape

from batchllm_flows import __version__
from batchllm_flows.html_report.attention_trace import AttentionTrace
from batchllm_flows.html_report.plots import Plots, plan_plots
from batchllm_flows.html_report.step_trace import StepTrace
from batchllm_flows.report import JobReport
from batchllm_flows.report_text import forecast_rows, outline_rows, truncation_advice, whose_figures
from batchllm_operators.plan.markdown import duration, explain_order, usd
from batchllm_operators.records import PlanSummary
from batchllm_operators.wording import counted

TEMPLATE = "page.html.j2"

_PIECES = re.compile(r"(?<=[./])")


def plan_page(plan: PlanSummary, job_name: str) -> str:
    """The page of a plan, before anything is computed."""
    return _render(job_name, plan, plan_plots(plan), report=None, trace=None, attention=None, notes=())


def report_page(
    report: JobReport,
    plan: PlanSummary,
    plots: Plots,
    trace: StepTrace | None,
    attention: AttentionTrace | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page of a finished run.

    Args:
        report: of the run.
        plan: its last one.
        plots: as `report_plots` draws them.
        trace: what the engines wrote of their steps.
        attention: what they wrote of prefix-shared attention; None where it was not in use.
        notes: what could not be read.
    """
    return _render(report.job_name, plan, plots, report=report, trace=trace, attention=attention, notes=notes)


def _render(
    job_name: str,
    plan: PlanSummary,
    plots: Plots,
    *,
    report: JobReport | None,
    trace: StepTrace | None,
    attention: AttentionTrace | None,
    notes: Sequence[str],
) -> str:
    return _environment().get_template(TEMPLATE).render(
        job_name=job_name,
        plan=plan,
        plots=plots,
        report=report,
        trace=trace,
        attention=attention,
        notes=notes,
        order=explain_order(plan),
        forecast=None if report is None else forecast_rows(report.forecast),
        whose=None if report is None else whose_figures(report),
        outline=() if report is None or report.outline is None else outline_rows(report.outline),
        advice=None if report is None else truncation_advice(report),
        version=__version__,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("batchllm_flows", "html_report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "counted": counted,
        "breakable": breakable,
        "share": lambda value: f"{value:.1%}",
        "usd": usd,
        "duration": duration,
        "drawing": Markup,  # an `<svg>` element of our own
    }
    return environment


def breakable(name: str) -> Markup:
    """A long name that may be broken behind its dots and slashes, where a narrow page has to break it."""
    pieces = (escape(piece) for piece in _PIECES.split(name))
    return Markup("<wbr>").join(pieces)
