"""What `job.py` makes of its runs: the check of the answers, the figures, the table."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


class WrongResultError(Exception):
    """A program did not answer every row exactly once with some text."""


@dataclass(frozen=True)
class Run:
    """What one run of a program took and said; None: the program cannot tell."""

    wall_seconds: float
    load_seconds: float | None
    work_seconds: float | None
    prompt_tokens: int | None
    cached_tokens: int | None


def check_answers(program: str, asked: Sequence[str], ids: Sequence[str], texts: Sequence[str | None]) -> None:
    """Every id of `asked` exactly once among `ids`, each with some text.

    Raises:
        WrongResultError: names the program and the first rows at fault.
    """
    counted = Counter(ids)
    faults = {
        "not answered": [one for one in asked if not counted[one]],
        "answered more than once": [one for one, count in counted.items() if count > 1],
        "never asked": sorted(set(counted) - set(asked)),
        "answered without text": [one for one, text in zip(ids, texts, strict=True) if not text],
    }
    told = [f"{len(rows)} rows {fault} ({', '.join(rows[:3])})" for fault, rows in faults.items() if rows]
    if told:
        raise WrongResultError(f"{program}: expected each of {len(asked)} rows once with text, got " + "; ".join(told))


def equal_share(answers: dict[str, str], reference: dict[str, str]) -> float:
    """Share of the rows with the same text."""
    return round(sum(answers[row] == text for row, text in reference.items()) / len(reference), 3)


def figures(runs: Sequence[Run], rows: int) -> dict[str, Any]:
    """Medians of the rounds, and the spread of the wall seconds as a share of their median."""
    walls = [run.wall_seconds for run in runs]
    wall = statistics.median(walls)
    medians: dict[str, Any] = {}
    for name in ("load_seconds", "work_seconds", "prompt_tokens", "cached_tokens"):
        values = [value for run in runs if (value := asdict(run)[name]) is not None]
        medians[name] = round(statistics.median(values), 2) if values else None
    computed = None
    if medians["prompt_tokens"] is not None and medians["cached_tokens"] is not None:
        computed = medians["prompt_tokens"] - medians["cached_tokens"]
    return {
        "wall_seconds": round(wall, 2),
        "spread": round((max(walls) - min(walls)) / wall, 3),
        "rows_per_second": round(rows / wall, 2),
        **medians,
        "computed_prompt_tokens": computed,
        "rows_answered": rows,
        "runs": [asdict(run) for run in runs],
    }


def table(result: dict[str, Any]) -> str:
    """The figures for people."""
    columns = {
        "wall s": "wall_seconds",
        "spread": "spread",
        "x ours": "times_ours",
        "load s": "load_seconds",
        "work s": "work_seconds",
        "rows/s": "rows_per_second",
        "computed": "computed_prompt_tokens",
        "cached": "cached_tokens",
        "rows": "rows_answered",
        "= llm": "same_text_as_llm",
    }
    lines = [f"{'program':<10}" + "".join(f"{title:>10}" for title in columns)]
    for name, one in result["programs"].items():
        told = ("-" if one.get(key) is None else f"{one[key]:g}" for key in columns.values())
        lines.append(f"{name:<10}" + "".join(f"{text:>10}" for text in told))
    lines += [f"{name:<10}  not run: {reason}" for name, reason in result["not_run"].items()]
    if result["startup"] is not None:
        lines += ["", *(f"{name:<16}{seconds:>8.2f}" for name, seconds in result["startup"].items())]
    return "\n".join(lines)
