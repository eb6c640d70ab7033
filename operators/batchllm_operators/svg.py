"""Plots as SVG in one look, to stand in a page of their own or as an image: the same figures give the same bytes.

matplotlib is imported when a plot is drawn, not before: a step that draws nothing does not load it.
"""

from __future__ import annotations

import base64
import io
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

WIDTH_INCHES = 6.6
LARGEST_IMAGE_BYTES = 100_000
_DRAWING = threading.Lock()  # matplotlib's settings belong to the whole process


@dataclass(frozen=True, slots=True)
class Role:
    """What a colour is for; a page says by CSS variables what it looks like in light and in dark.

    Attributes:
        mark: the colour matplotlib draws with, which stands for nothing else.
        variable: name of the CSS variable that takes its place.
        light: colour where no page sets the variable.
    """

    mark: str
    variable: str
    light: str


INK = Role("#0a0b01", "--ink", "#1d2733")
MUTED = Role("#0a0b02", "--muted", "#5b6875")
GRID = Role("#0a0b03", "--grid", "#dfe4ea")
SURFACE = Role("#0a0b04", "--surface", "#ffffff")
FIRST = Role("#0a0b05", "--first", "#2c68ab")
FIRST_DEEP = Role("#0a0b06", "--first-deep", "#1d4a7d")
SECOND = Role("#0a0b07", "--second", "#c9781f")
PALE = Role("#0a0b08", "--pale", "#b9c4d0")
ON_FILL = Role("#0a0b09", "--on-fill", "#ffffff")
_ROLES = (INK, MUTED, GRID, SURFACE, FIRST, FIRST_DEEP, SECOND, PALE, ON_FILL)

_LOOK: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
    "svg.hashsalt": "batchllm",
    "text.parse_math": False,
    "font.size": 9.0,
    "text.color": INK.mark,
    "axes.labelcolor": MUTED.mark,
    "axes.edgecolor": GRID.mark,
    "axes.facecolor": "none",
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK.mark,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID.mark,
    "grid.linewidth": 0.8,
    "hatch.color": MUTED.mark,
    "xtick.color": GRID.mark,
    "ytick.color": GRID.mark,
    "xtick.labelcolor": MUTED.mark,
    "ytick.labelcolor": MUTED.mark,
    "legend.frameon": False,
    "figure.facecolor": "none",
}


def draw(height: float, paint: Callable[[Figure], None]) -> str:
    """One plot as an `<svg>` element whose colours follow the page it stands in.

    Args:
        height: in inches; the width is always `WIDTH_INCHES`.
        paint: draws into the figure, with the colours of the roles' `mark`.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure as NewFigure

    content = io.StringIO()
    with _DRAWING, mpl.rc_context(_LOOK):
        figure = NewFigure(figsize=(WIDTH_INCHES, height), layout="constrained")
        paint(figure)
        figure.draw_without_rendering()
        _settle(figure)
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return _embeddable(content.getvalue())


def bar_axes(axes: Axes, *, unit: str, percent: bool = False) -> None:
    """Dress the axes of horizontal bars: first bar on top, values along the bottom."""
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    axes.invert_yaxis()
    axes.grid(visible=True, axis="x")
    axes.tick_params(axis="y", length=0, labelcolor=INK.mark)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(unit)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0) if percent else FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """A count in few characters: 950, 12.5k, 3.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # three digits round 999,999 up
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def markdown_image(title: str, svg: str | None) -> list[str]:
    """Lines of Markdown that show a plot as an image; none for no plot, or for one too large for a Prefect artifact."""
    if svg is None:
        return []
    # An image sees no variables of the page around it: it has the light colours, and so a light ground.
    with_ground = svg.replace(">", f'><rect width="100%" height="100%" fill="{SURFACE.light}"/>', 1)
    content = base64.b64encode(with_ground.encode()).decode()
    if len(content) > LARGEST_IMAGE_BYTES:
        return []
    return ["", f"![{title}](data:image/svg+xml;base64,{content})"]


def _settle(figure: Figure) -> None:
    """Round what the layout has found: its last digits differ from call to call, and the names of clips with them."""
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = axes.get_position().bounds
        axes.set_position((round(left, 4), round(bottom, 4), round(width, 4), round(height, 4)))


def _embeddable(document: str) -> str:
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # A style element would rule the whole page, and names of groups would stand in it twice.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    for role in _ROLES:
        svg = svg.replace(role.mark, f"var({role.variable}, {role.light})")
    return svg.replace("<svg ", '<svg style="stroke-linejoin: round" ', 1).strip()
