"""The report as plots: what was saved, and what was expected against what came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from batchllm_flows.html_report.step_trace import StepTrace
from batchllm_flows.report import ExecutedPlan, JobReport
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
    if not plan.prompt_tokens:
        return None
    expected = plan.expected_saving if report is None else float(report.forecast.saving.expected)
    bars = [] if plan.stock_saving is None else [("stock engine, rows as given", plan.stock_saving, PALE)]
    bars += [("one prefix a request", plan.single_level_saving, PALE), ("forecast of the plan", expected, FIRST)]
    if report is not None:
        bars.append(("this job", report.saving, SECOND))
    bars.append(("optimum, nothing evicted", plan.optimum_saving, PALE))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        names, values, colours = zip(*bars, strict=True)
        drawn = axes.barh(names, values, color=[colour.mark for colour in colours], height=0.66)
        axes.bar_label(drawn, [f"{value:.1%}" for value in values], padding=4)
        axes.set_xlim(0, max(1.12 * max(values), 0.01))
        bar_axes(axes, unit="share of the prompt tokens that need not be computed", percent=True)

    return draw(0.7 + BAR_INCHES * len(bars), paint)


def step_seconds_plot(report: JobReport) -> str:
    """Wall-clock seconds of each step; of the execute step, the loading of the engines apart."""
    seconds = report.seconds
    values = [seconds.stage, seconds.plan, seconds.execute, seconds.merge]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        drawn = axes.barh(["stage", "plan", "execute", "merge"], values, color=FIRST.mark, height=0.66)
        axes.bar_label(drawn, [f"{value:,.1f}" for value in values], padding=4)
        loading = max(seconds.execute - float(report.forecast.execute_seconds.actual), 0.0)
        if loading > 0:
            axes.barh(["execute"], [loading], color=PALE.mark, height=0.66, label="loading the engines")
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
    time, *series = _with_breaks(
        trace,
        trace.seconds / (1 if in_seconds else 60),
        trace.prefill_tokens,
        trace.decode_tokens,
        trace.kv_use,
        trace.kv_most,
        trace.running,
        trace.waiting,
    )
    prefill, decode, kv_use, kv_most, running, waiting = series

    def paint(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, PercentFormatter

        tokens, kv, requests = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1.2, 1.2))
        tokens.fill_between(time, 0, decode, color=SECOND.mark, label="decode", linewidth=0)
        tokens.fill_between(time, decode, decode + prefill, color=FIRST.mark, label="prefill", linewidth=0)
        tokens.set_title("tokens per step")
        tokens.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        kv.fill_between(time, 0, kv_most, color=PALE.mark, label="most", linewidth=0)
        kv.plot(time, kv_use, color=FIRST.mark, label="mean", linewidth=1.4)
        kv.set_title("KV cache in use")
        kv.set_ylim(0, 1.04)
        kv.yaxis.set_major_formatter(PercentFormatter(1.0))
        requests.plot(time, running, color=FIRST.mark, label="running", linewidth=1.4)
        requests.plot(time, waiting, color=MUTED.mark, label="waiting", linewidth=1.2, linestyle="--")
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


def _with_breaks(trace: StepTrace, *series: np.typing.NDArray[np.float64]) -> list[np.typing.NDArray[np.float64]]:
    """The series, cut by NaN where no engine made a step for long: a line there would claim what was not."""
    idle = np.flatnonzero(np.diff(trace.seconds) > max(IDLE_SECONDS, 3 * trace.point_seconds)) + 1
    return [np.insert(one, idle, np.nan) for one in series]
