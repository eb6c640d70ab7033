"""The plan as plots: what is shared, and by how many."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchllm_operators.plan.markdown import group_sizes
from batchllm_operators.records import PlanSummary
from batchllm_operators.svg import FIRST, FIRST_DEEP, GRID, ON_FILL, PALE, SURFACE, bar_axes, draw, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABEL_WIDTH = 0.075
"""Share of the plot's width below which a prefix has no room for its figures."""
_LABEL_HEIGHT = 0.06


def forest_plot(plan: PlanSummary) -> str | None:
    """The first levels of the prefix forest; None where nothing is shared.

    A prefix is as wide as it has requests and reaches from where its parent ends down to where it ends itself, in
    tokens: the coloured area is the prompt tokens that stand in shared prefixes.
    """
    if not plan.shape.shared_prefixes:
        return None
    levels = _levels(plan)
    starts = _starts(plan, levels)
    deepest = max(one.prefix_tokens for one in plan.shape.shared_prefixes)

    def paint(figure: Figure) -> None:
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import FuncFormatter

        axes = figure.subplots()
        axes.add_patch(Rectangle((0, 0), plan.counts.requests, deepest, facecolor=GRID.mark, alpha=0.5))
        for place, one in enumerate(plan.shape.shared_prefixes):
            top = plan.shape.shared_prefixes[one.parent].prefix_tokens if one.parent >= 0 else 0
            height = one.prefix_tokens - top
            axes.add_patch(
                Rectangle(
                    (starts[place], top),
                    one.requests,
                    height,
                    facecolor=(FIRST if levels[place] % 2 == 0 else FIRST_DEEP).mark,
                    edgecolor=SURFACE.mark,
                    linewidth=0.7,
                )
            )
            if one.requests >= _LABEL_WIDTH * plan.counts.requests and height >= _LABEL_HEIGHT * deepest:
                axes.text(
                    starts[place] + one.requests / 2,
                    top + height / 2,
                    f"{short(one.requests)} x {short(height)}",
                    color=ON_FILL.mark,
                    ha="center",
                    va="center",
                    fontsize=8.5,
                )
        axes.set(xlim=(0, plan.counts.requests), ylim=(deepest, 0), xlabel="requests", ylabel="prompt tokens")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        for spine in axes.spines.values():
            spine.set_visible(False)

    return draw(3.6, paint)


def sharing_plot(plan: PlanSummary) -> str | None:
    """Requests and saved tokens by the size of their prefix group; None where there is no group."""
    degrees = plan.shape.sharing_degrees
    if not degrees:
        return None
    sizes = [f"groups of {size}" for size in group_sizes(plan)]

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, title, values, colour in (
            (left, "requests", [one.requests for one in degrees], PALE),
            (right, "tokens saved", [one.saved_tokens for one in degrees], FIRST),
        ):
            bars = axes.barh(sizes, values, color=colour.mark, height=0.7)
            axes.bar_label(bars, [short(value) for value in values], padding=3, fontsize=8.5)
            axes.margins(x=0.14)
            axes.set_title(title)
            axes.grid(visible=True, axis="x")
        bar_axes(left, unit="")
        right.tick_params(axis="y", length=0)
        right.spines["left"].set_visible(False)
        right.xaxis.set_major_formatter(left.xaxis.get_major_formatter())

    return draw(0.9 + 0.27 * len(degrees), paint)


def _levels(plan: PlanSummary) -> list[int]:
    """How many shared prefixes stand above each one; all of them stand before it in the list."""
    levels: list[int] = []
    for one in plan.shape.shared_prefixes:
        levels.append(levels[one.parent] + 1 if one.parent >= 0 else 0)
    return levels


def _starts(plan: PlanSummary, levels: list[int]) -> list[int]:
    """Where each prefix begins among the requests: children side by side below their parent, the largest first."""
    starts = [0] * len(levels)
    free: dict[int, int] = {-1: 0}
    prefixes = plan.shape.shared_prefixes
    for place in sorted(range(len(levels)), key=lambda place: (levels[place], -prefixes[place].requests)):
        parent = prefixes[place].parent
        starts[place] = free[place] = free[parent]
        free[parent] += prefixes[place].requests
    return starts
