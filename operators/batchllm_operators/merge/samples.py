"""What an output looks like: a few answers, a few errors of each kind, and how many answers ended at `max_tokens`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchllm_operators.records import OutputSamples, SampleRow

SAMPLES_OF_A_KIND = 3
TEXT_CHARACTERS = 600

_ENDED_BY_LENGTH = "length"


class SampleCollector:
    """Looks at answers on their way to the output."""

    def __init__(self) -> None:
        self._row = 0
        self._truncated = 0
        self._answers: list[tuple[int, str]] = []
        self._errors: dict[str, list[tuple[int, str]]] = {}

    def watched(self, answers: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """The same tables, of `OUTPUT_FIELDS` in row order, noted on the way."""
        for table in answers:
            self._note(table)
            self._row += len(table)
            yield table

    @property
    def rows(self) -> list[int]:
        """Rows of the samples, ascending, each once."""
        return sorted({row for row, _ in self._all()})

    def samples(self, row_ids: dict[int, str]) -> OutputSamples:
        """What was noted.

        Args:
            row_ids: id of each row of `rows`.
        """

        def named(kept: list[tuple[int, str]]) -> tuple[SampleRow, ...]:
            return tuple(SampleRow(row_id=row_ids[row], text=text) for row, text in kept)

        return OutputSamples(
            truncated_rows=self._truncated,
            answers=named(self._answers),
            errors={code: named(kept) for code, kept in sorted(self._errors.items())},
        )

    def _all(self) -> Iterator[tuple[int, str]]:
        yield from self._answers
        for kept in self._errors.values():
            yield from kept

    def _note(self, table: pa.Table) -> None:
        self._truncated += pc.sum(pc.equal(table["finish_reason"], _ENDED_BY_LENGTH)).as_py() or 0
        answered = np.flatnonzero(pc.is_valid(table["completion"]).to_numpy())
        for row in answered[: SAMPLES_OF_A_KIND - len(self._answers)].tolist():
            self._answers.append((self._row + row, _short(table["completion"][row].as_py())))
        faulty = np.flatnonzero(pc.is_valid(table["error"]).to_numpy())
        if not len(faulty):
            return
        codes = pc.struct_field(table["error"], "code").take(faulty)
        for code in pc.unique(codes).to_pylist():
            kept = self._errors.setdefault(code, [])
            of_kind = faulty[pc.equal(codes, code).to_numpy()]
            for row in of_kind[: SAMPLES_OF_A_KIND - len(kept)].tolist():
                kept.append((self._row + row, _short(table["error"][row].as_py()["message"])))


def _short(text: str) -> str:
    return text if len(text) <= TEXT_CHARACTERS else f"{text[: TEXT_CHARACTERS - 3]}..."
