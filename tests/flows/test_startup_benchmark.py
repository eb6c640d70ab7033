"""The benchmark of what a small job costs beside its model: its arithmetic and its turns, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchllm_flows.job import BatchJob
from benchmarks.job_results import table
from benchmarks.startup import FIGURES, ROWS, medians_in_turn, overhead_seconds, small_job


def a_report(**changes: Any) -> dict[str, Any]:
    return {
        "rows_out": ROWS, "rows_error": 0, "computed_requests": ROWS, "engine_load_seconds": 10.0,
        "forecast": {"execute_seconds": {"expected": 1.0, "actual": 0.5}},
    } | changes  # fmt: skip


def test_the_overhead_is_what_is_left_without_loading_and_computing() -> None:
    assert overhead_seconds(16.0, a_report()) == 5.5


@pytest.mark.parametrize("wrong", [{"rows_out": 79}, {"rows_error": 1}, {"computed_requests": 0}])
def test_a_run_that_did_not_answer_every_row_is_no_figure(wrong: dict[str, int]) -> None:
    with pytest.raises(SystemExit, match="expected 80 answers"):
        overhead_seconds(16.0, a_report(**wrong))


def test_measures_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    seconds = {"here": iter([99.0, 1.0, 5.0, 2.0]), "before": iter([99.0, 7.0, 9.0, 8.0])}

    def measure(name: str) -> dict[str, float]:
        calls.append(name)
        return {"floor_s": next(seconds[name])}

    told: list[str] = []
    medians = medians_in_turn({name: (lambda name=name: measure(name)) for name in seconds}, 3, told.append)
    assert medians == {"here": {"floor_s": 2.0}, "before": {"floor_s": 8.0}}
    assert calls == ["here", "before", "before", "here", "here", "before", "before", "here"]
    assert "not counted" in told[0]
    assert "not counted" not in told[2]


def test_the_job_is_valid_and_of_eighty_rows(tmp_path: Path) -> None:
    values = small_job(tmp_path, "m", "float32") | {"sink": {"uri": str(tmp_path / "out")}}
    assert BatchJob.model_validate(values).model.id == "m"
    assert ROWS == 80


def test_the_benchmark_of_whole_programs_prints_the_figures_too() -> None:
    told = table({"programs": {}, "not_run": {}, "startup": dict.fromkeys(FIGURES, 1.25)})
    assert all(f"{name:<16}" in told for name in FIGURES)
    assert "1.25" in told
