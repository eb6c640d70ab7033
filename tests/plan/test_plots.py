"""Plots of a plan."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from batchllm_operators.plan.planning import plan_requests
from batchllm_operators.plan.plots import forest_plot, sharing_plot
from batchllm_operators.records import PlanSummary
from batchllm_operators.specs.planning import PlanningSpec
from batchllm_operators.store import Store
from batchllm_operators.svg import LARGEST_IMAGE_BYTES, markdown_image, short
from tests.plan.staged_jobs import stage_prompts

BLOCK = 4


def plan_of(folder: Path, prompts: list[list[int]]) -> PlanSummary:
    work = Store(str(folder))
    return plan_requests(work, stage_prompts(work, prompts), PlanningSpec(block_size=BLOCK))


def boxes(svg: str, colour: str) -> list[tuple[float, float, float, float]]:
    """Left, top, width and height of the rectangles of a colour."""
    found = []
    for path in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):  # noqa: S314 - our own
        if f"fill: var({colour}," in path.get("style", ""):
            numbers = [float(one) for one in re.findall(r"-?[\d.]+", path.get("d", ""))]
            across, down = numbers[0::2], numbers[1::2]
            found.append((min(across), min(down), max(across) - min(across), max(down) - min(down)))
    return found


def test_a_prefix_is_as_wide_as_its_requests_and_as_high_as_the_tokens_it_adds(tmp_path: Path) -> None:
    common, first, second = [1] * 8, [2] * 8, [3] * 16
    prompts = [[*common, *first, 100 + index] for index in range(2)]
    prompts += [[*common, *second, 200 + index] for index in range(6)]
    prompts += [[300 + index] * 5 for index in range(2)]
    svg = forest_plot(plan_of(tmp_path, prompts))
    assert svg is not None
    (top,) = boxes(svg, "--first")
    large, small = sorted(boxes(svg, "--first-deep"))
    (whole,) = boxes(svg, "--grid")
    assert top[2] / whole[2] == pytest.approx(8 / 10)
    assert large[2] / top[2] == pytest.approx(6 / 8), "the largest stands first"
    assert small[2] / top[2] == pytest.approx(2 / 8)
    assert [top[3] / whole[3], large[3] / whole[3], small[3] / whole[3]] == pytest.approx([8 / 24, 16 / 24, 8 / 24])
    assert large[0] == pytest.approx(top[0])
    assert small[0] == pytest.approx(large[0] + large[2])
    assert large[1] == pytest.approx(top[1] + top[3]), "below what it continues"


def test_where_nothing_is_shared_there_is_no_forest(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [[index] * 9 for index in range(5)])
    assert forest_plot(plan) is None
    assert sharing_plot(plan) is not None
    assert sharing_plot(plan_of(tmp_path, [])) is None


def test_sharing_is_drawn_by_the_size_of_groups(tmp_path: Path) -> None:
    prompts = [[group] * 8 + [100 * group + member] for group in range(1, 4) for member in range(2 * group)]
    svg = sharing_plot(plan_of(tmp_path, prompts))
    assert svg is not None
    for words in ("tokens saved", ">groups of 2<", ">groups of 3 to 4<", ">groups of 5 to 8<"):
        assert words in svg


def test_plots_as_images_carry_their_own_ground_and_stay_small(tmp_path: Path) -> None:
    svg = forest_plot(plan_of(tmp_path, [[1] * 8 + [index] for index in range(9)]))
    (_, line) = markdown_image("forest", svg)
    found = re.fullmatch(r"!\[forest\]\(data:image/svg\+xml;base64,(.*)\)", line)
    assert found is not None
    image = ElementTree.fromstring(base64.b64decode(found[1]))  # noqa: S314 - our own
    assert image[0].get("fill") == "#ffffff"
    assert markdown_image("nothing", None) == []
    assert markdown_image("large", f"<svg>{'x' * LARGEST_IMAGE_BYTES}</svg>") == []


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (950, "950"), (12_500, "12.5k"), (999_999, "1M"), (3.2e6, "3.2M"), (2e9, "2G")]
)
def test_counts_are_short(value: float, text: str) -> None:
    assert short(value) == text
