"""The report as plots: what was saved, and what was expected against what came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from batchllm_flows.html_report.step_trace import StepTrace
from batchllm_flows.report import ExecutedPlan, JobReport
from batchllm_operators.columns.arrays import Floats
from batchllm_operators.plan.plots import forest_plot, sharing_plot
from batchllm_operators.records import PlanSummary
from batchllm_operators.svg import FIRST, GRID, INK, MUTED, PALE, SECOND, bar_axes, draw, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR_INCHES = 0.3
LONGEST_IN_SECONDS = 240
IDLE_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Plots:
    """The plots of a page, each an `<svg>` element, or None where there is nothing to draw."""

    saving: str | None
    forest: str | None
    sharing: str | None
    bundles: str | None = None
    steps: str | None = None
    engine_steps: str | None = None


def plan_plots(plan: PlanSummary) -> Plots:
    """What can be drawn before anything is computed."""
    return Plots(saving=saving_plot(plan, None), forest=forest_plot(plan), sharing=sharing_plot(plan))


def report_plots(report: JobReport, executed: Sequence[ExecutedPlan], trace: StepTrace | None) -> Plots:
    """The plots of a finished run; `trace` where the engines wrote of their steps."""
    plan = executed[-1].plan
    return Plots(
        saving=saving_plot(plan, report),
        forest=forest_plot(plan),
        sharing=sharing_plot(plan),
        bundles=bundles_plot(executed),
        steps=step_seconds_plot(report),
        engine_steps=None if trace is None else engine_steps_plot(trace),
    )


def saving_plot(plan: PlanSummary, report: JobReport | None) -> str | None:
    """Savings side by side: a stock engine, one level of prefixes, the plan, the fact, the optimum."""
    if not plan.counts.prompt_tokens:
        return None
    expected = plan.saving.planned if report is None else float(report.forecast.saving.expected)
    bars = [] if plan.saving.stock is None else [("stock engine, rows as given", plan.saving.stock, PALE)]
    bars += [("one prefix a request", plan.saving.single_level, PALE), ("forecast of the plan", expected, FIRST)]
    if report is not None:
        bars.append(("this job", report.saving, SECOND))
    bars.append(("optimum, nothing evicted", plan.saving.optimum, PALE))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        names, values, colours = zip(*bars, strict=True)
        drawn = axes.barh(names, values, color=[colour.mark for colour in colours], height=0.66)
        axes.bar_label(drawn, [f"{value:.1%}" for value in values], padding=4)
        axes.set_xlim(0, max(1.12 * max(values), 0.01))
        bar_axes(axes, unit="share of the prompt tokens that need not be computed", percent=True)

    return draw(0.7 + BAR_INCHES * len(bars), paint)


def step_seconds_plot(report: JobReport) -> str:
    """Wall-clock seconds of each step; of the execute step, the wait for engines to load apart."""
    seconds = report.seconds
    values = [seconds.stage, seconds.plan, seconds.execute, seconds.merge]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        drawn = axes.barh(["stage", "plan", "execute", "merge"], values, color=FIRST.mark, height=0.66)
        axes.bar_label(drawn, [f"{value:,.1f}" for value in values], padding=4)
        loading = max(seconds.execute - float(report.forecast.execute_seconds.actual), 0.0)
        if loading > 0:
            axes.barh(["execute"], [loading], color=PALE.mark, height=0.66, label="waiting for engines to load")
            axes.legend(loc="lower right")
        axes.margins(x=0.1)
        bar_axes(axes, unit="seconds")

    return draw(0.7 + BAR_INCHES * len(values), paint)


def bundles_plot(executed: Sequence[ExecutedPlan]) -> str | None:
    """Each bundle's seconds as expected and as they came, and how its output compares; None where none was computed."""
    bundles = [pair for one in executed for pair in one.bundles()]
    if not bundles:
        return None
    expected = np.array([bundle.expected_seconds for bundle, _ in bundles])
    actual = np.array([result.seconds for _, result in bundles])
    tokens = [(result.completion_tokens, bundle.expected_output_tokens) for bundle, result in bundles]
    ratios = [came / planned for came, planned in tokens if planned > 0]

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        most = 1.08 * max(expected.max(), actual.max(), 0.001)
        left.plot([0, most], [0, most], color=MUTED.mark, linewidth=1, linestyle="--")
        left.scatter(expected, actual, s=22, color=FIRST.mark, alpha=0.75)
        left.set(xlim=(0, most), ylim=(0, most), xlabel="forecast, seconds", ylabel="fact, seconds")
        left.set_title("seconds of each bundle")
        left.grid(visible=True)
        right.hist(ratios, bins=min(max(len(ratios) // 3, 9), 25), color=FIRST.mark, rwidth=0.92)
        right.axvline(1.0, color=MUTED.mark, linewidth=1, linestyle="--")
        right.set(xlabel="output tokens, fact over forecast", ylabel="bundles")
        right.set_title("output of each bundle")
        right.yaxis.get_major_locator().set_params(integer=True)
        right.grid(visible=True, axis="y")

    return draw(3.0, paint)


def engine_steps_plot(trace: StepTrace) -> str:
    """Tokens per step split into prefill and decode, KV use, and requests, over time."""
    span = float(trace.seconds[-1]) + trace.point_seconds
    in_seconds = span <= LONGEST_IN_SECONDS
    seconds, *series = as_steps(
        trace,
        trace.prefill_tokens,
        trace.decode_tokens,
        trace.kv_use,
        trace.kv_most,
        trace.running,
        trace.waiting,
    )
    time = seconds / (1 if in_seconds else 60)
    prefill, decode, kv_use, kv_most, running, waiting = series

    def paint(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, PercentFormatter

        tokens, kv, requests = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1.2, 1.2))
        area: dict[str, Any] = {"linewidth": 0, "step": "post"}
        tokens.fill_between(time, 0, decode, color=SECOND.mark, label="decode", **area)
        tokens.fill_between(time, decode, decode + prefill, color=FIRST.mark, label="prefill", **area)
        tokens.set_title("tokens per step")
        tokens.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        kv.fill_between(time, 0, kv_most, color=PALE.mark, label="most", **area)
        kv.step(time, kv_use, where="post", color=FIRST.mark, label="mean", linewidth=1.4)
        kv.set_title("KV cache in use")
        kv.set_ylim(0, 1.04)
        kv.yaxis.set_major_formatter(PercentFormatter(1.0))
        requests.step(time, running, where="post", color=FIRST.mark, label="running", linewidth=1.4)
        requests.step(time, waiting, where="post", color=MUTED.mark, label="waiting", linewidth=1.2, linestyle="--")
        requests.set_title("requests of an engine")
        requests.set_xlabel(f"{'seconds' if in_seconds else 'minutes'} since the first step")
        for axes in (tokens, kv, requests):
            _dress(axes)

    return draw(5.4, paint)


def _dress(axes: Axes) -> None:
    axes.grid(visible=True, axis="y")
    axes.spines["bottom"].set_color(GRID.mark)
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2, labelcolor=INK.mark, borderaxespad=0)


def as_steps(trace: StepTrace, *series: Floats) -> list[Floats]:
    """The times of the points and their values, ready to be drawn as steps: each value holds until the next point.

    Before a pause of the engines, and at the end, a step ends after its own time, and nothing is drawn until the next:
    a line there would claim what was not.
    """
    own_seconds = max(trace.point_seconds, trace.step_seconds / trace.steps)
    last = np.append(np.diff(trace.seconds) > max(IDLE_SECONDS, 3 * trace.point_seconds), True)
    # Behind the last point of each stretch: the end of its step, and a gap.
    places = np.repeat(np.flatnonzero(last) + 1, 2)

    def with_ends(values: Floats, ends: Floats) -> Floats:
        return np.insert(values, places, np.stack([ends[last], np.full(last.sum(), np.nan)], axis=1).ravel())

    return [with_ends(trace.seconds, trace.seconds + own_seconds), *(with_ends(values, values) for values in series)]
