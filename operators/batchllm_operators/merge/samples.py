"""What an output looks like: a few answers, and how many answers ended at `max_tokens`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchllm_operators.records import OutputSamples, RowErrorExample, SampleAnswer
from batchllm_operators.tasks.base import Task
from batchllm_operators.tasks.generate import ENDED_BY_LENGTH, FINISH_REASON

SAMPLE_ANSWERS = 3
TEXT_CHARACTERS = 600


class SampleCollector:
    """Looks at answers on their way to the output.

    Args:
        task: of the job; where its answers have no text to read, there are no sample answers.
    """

    def __init__(self, task: Task) -> None:
        self._text_name = task.text_name
        self._row = 0
        self._truncated = 0
        self._answers: list[tuple[int, str]] = []

    def watched(self, answers: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """The same tables, in row order, noted on the way."""
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
        if FINISH_REASON in table.column_names:
            self._truncated += pc.sum(pc.equal(table[FINISH_REASON], ENDED_BY_LENGTH)).as_py() or 0
        if self._text_name is None or len(self._answers) == SAMPLE_ANSWERS:
            return
        texts = table[self._text_name]
        answered = np.flatnonzero(pc.is_valid(texts).to_numpy())
        for row in answered[: SAMPLE_ANSWERS - len(self._answers)].tolist():
            self._answers.append((self._row + row, _short(texts[row].as_py())))


def _short(text: str) -> str:
    return text if len(text) <= TEXT_CHARACTERS else f"{text[: TEXT_CHARACTERS - 3]}..."
