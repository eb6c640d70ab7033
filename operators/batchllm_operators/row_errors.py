"""Rows without an answer: how many of each kind, a few examples, and whether they are too many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from batchllm_operators.errors import TerminalError
from batchllm_operators.records import RowErrorExample
from batchllm_operators.wording import counted

EXAMPLES_OF_A_KIND = 3
MESSAGE_CHARACTERS = 300
"""Most characters of an example: a message may quote the row."""

Examples = Mapping[str, Iterable[RowErrorExample]]


class ErrorExamples:
    """Collects the first few rows of each kind of error."""

    def __init__(self) -> None:
        self._found: dict[str, list[RowErrorExample]] = {}

    def add(self, code: str, row_id: str, message: str) -> None:
        """Take an example, unless there are enough of its kind."""
        if len(self._found.get(code, ())) < EXAMPLES_OF_A_KIND:
            example = RowErrorExample(row_id=row_id, message=_in_one_line(message))
            self._found.setdefault(code, []).append(example)

    def by_kind(self) -> dict[str, tuple[RowErrorExample, ...]]:
        """Kind of error -> the examples kept."""
        return {code: tuple(examples) for code, examples in sorted(self._found.items())}


def refuse_too_many_errors(
    error_rows: Mapping[str, int], rows: int, max_error_fraction: float, examples: Examples
) -> None:
    """Refuse a job of which too many rows get no answer.

    Args:
        error_rows: rows by kind of error.
        rows: all rows.
        max_error_fraction: share of them that may have errors.
        examples: some of the errors, by kind.

    Raises:
        TerminalError: there are more; says how many of which kind, with examples.
    """
    errors = sum(error_rows.values())
    if errors > max_error_fraction * rows:
        kinds = most_frequent_first(error_rows)
        counts = ", ".join(f"{code} {count}" for code, count in kinds)
        shown = "; ".join(f"row {one.row_id}: {one.message}" for code, _ in kinds for one in examples.get(code, ()))
        raise TerminalError(
            f"{errors:,} of {counted(rows, 'row')} {'has' if rows == 1 else 'have'} errors, more than "
            f"max_error_fraction {max_error_fraction} allows: {counts}; {shown}; mend the rows or the prompt, or set "
            "execution.max_error_fraction"
        )


def most_frequent_first(error_rows: Mapping[str, int]) -> list[tuple[str, int]]:
    """Kinds of errors with their rows, the most frequent first."""
    return sorted(error_rows.items(), key=lambda one: (-one[1], one[0]))


def _in_one_line(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= MESSAGE_CHARACTERS else line[: MESSAGE_CHARACTERS - 3] + "..."
