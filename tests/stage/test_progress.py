"""What a person sees of staging while it runs."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.sampling import SamplingSpec
from batchllm_operators.specs.source import ColumnPrompt, SourceSpec
from batchllm_operators.stage.progress import StageProgress, StageStep
from batchllm_operators.stage.step import stage_source


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_a_line_comes_more_often_than_every_10_seconds() -> None:
    lines: list[str] = []
    clock = Clock()
    with StageProgress(40_000, None, lines.append, clock=clock) as progress:
        for rows in range(1000, 41_000, 1000):
            progress.update(StageStep.STAGE, rows)
            clock.now += 1
    assert lines == [f"{rows:,} of 40,000 rows staged, 1,000 rows/s" for rows in range(6000, 40_000, 5000)]


def test_each_step_has_its_own_rate_and_a_total_that_is_not_known_is_not_said() -> None:
    lines: list[str] = []
    clock = Clock()
    with StageProgress(None, None, lines.append, clock=clock) as progress:
        for step in StageStep:
            progress.update(step, 0)
            clock.now += 100
            progress.update(step, 5000)
    assert lines == [
        "5,000 rows searched for columns, 50 rows/s",
        "5,000 fields read, 50 rows/s",
        "5,000 rows staged, 50 rows/s",
    ]


def test_in_a_terminal_there_is_a_bar_and_no_line_in_the_log() -> None:
    lines: list[str] = []
    screen = io.StringIO()
    clock = Clock()
    with StageProgress(10_000, Console(file=screen, force_terminal=True, width=120), lines.append, clock=clock) as bar:
        for step in StageStep:
            for rows in (1000, 10_000):
                bar.update(step, rows)
                clock.now += 100
    shown = screen.getvalue()
    assert "10,000 of 10,000 rows staged, 90 rows/s" in shown
    assert "━" in shown
    assert lines == []


def test_the_tokenizer_is_named_before_it_is_loaded(tmp_path: Path, tiny_llama: str) -> None:
    lines: list[str] = []
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    stage_source(
        SourceSpec(uri=str(tmp_path / "in.jsonl"), format="jsonl"),
        ColumnPrompt(kind="column", column="text"),
        SamplingSpec(),
        ModelSpec(id=tiny_llama),
        str(tmp_path / "work"),
        StorageOptions(),
        log=lines.append,
    )
    assert lines[0] == f"loading the tokenizer of {tiny_llama}"
    assert lines[-1].startswith("staged 1 row: ")
