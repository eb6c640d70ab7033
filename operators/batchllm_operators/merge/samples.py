"""What an output looks like: a few answers, and how many answers ended at `max_tokens`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchllm_operators.records import OutputSamples, RowErrorExample, SampleAnswer

SAMPLE_ANSWERS = 3
TEXT_CHARACTERS = 600

_ENDED_BY_LENGTH = "length"


class SampleCollector:
    """Looks at answers on their way to the output."""

    def __init__(self) -> None:
        self._row = 0
        self._truncated = 0
        self._answers: list[tuple[int, str]] = []

    def watched(self, answers: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """The same tables, of `OUTPUT_FIELDS` in row order, noted on the way."""
        for table in answers:
            self._note(table)
            self._row += len(table)
            yield table

    @property
    def rows(self) -> list[int]:
        """Rows of the sample answers, ascending."""
        return [row for row, _ in self._answers]

    def samples(self, row_ids: Sequence[str], errors: Mapping[str, tuple[RowErrorExample, ...]]) -> OutputSamples:
        """What was noted.

        Args:
            row_ids: the id of each of `rows`.
            errors: examples by kind.
        """
        texts = (text for _, text in self._answers)
        return OutputSamples(
            truncated_rows=self._truncated,
            answers=tuple(SampleAnswer(row_id=name, text=text) for name, text in zip(row_ids, texts, strict=True)),
            errors=dict(errors),
        )

    def _note(self, table: pa.Table) -> None:
        self._truncated += pc.sum(pc.equal(table["finish_reason"], _ENDED_BY_LENGTH)).as_py() or 0
        answered = np.flatnonzero(pc.is_valid(table["completion"]).to_numpy())
        for row in answered[: SAMPLE_ANSWERS - len(self._answers)].tolist():
            self._answers.append((self._row + row, _short(table["completion"][row].as_py())))


def _short(text: str) -> str:
    return text if len(text) <= TEXT_CHARACTERS else f"{text[: TEXT_CHARACTERS - 3]}..."
