"""Results as JSON lines, each written at once: a run that is cut off loses nothing, and the next goes on from there."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Deadline:
    """A point in time after which nothing new is begun."""

    def __init__(self, seconds: float | None = None) -> None:
        """`seconds`: from now; None for never."""
        self._at = None if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return self._at is not None and time.monotonic() >= self._at


@dataclass(frozen=True, slots=True)
class Scope:
    """How much of a stage to run.

    Attributes:
        quick: fewer cases.
        part: this process's share of the cases, as (number from 0, of how many).
        deadline: after which nothing new is begun.
    """

    quick: bool = False
    part: tuple[int, int] = (0, 1)
    deadline: Deadline = field(default_factory=Deadline)


class ResultsFile:
    """The results of one stage in a file that several stages, and processes, append to.

    A row has the fields `stage` and `key`, and its results; or `failed`, the reason why it has none. A line that was
    cut off is no result.
    """

    def __init__(self, path: Path | None, stage: str) -> None:
        """`path`: None for the standard output; results are then known as long as this object."""
        self._path = path
        self._written: list[Row] = []
        self.stage = stage
        self.failures = 0

    def of_stage(self, stage: str) -> ResultsFile:
        """The results of another stage in the same file."""
        other = ResultsFile(self._path, stage)
        other._written = self._written
        return other

    def rows(self) -> list[Row]:
        """Results of the stage so far, the last of each key; failures are left out."""
        found = {}
        for row in read_rows(self._path) if self._path else self._written:
            if row.get("stage") == self.stage and "failed" not in row and "complete" not in row:
                found[row["key"]] = row
        return list(found.values())

    def add(self, key: str, **result: Any) -> None:
        """Writes one result."""
        self._write({"stage": self.stage, "key": key, **result})

    def collect(
        self, keys: Sequence[str], result: Callable[[str], Row], scope: Scope, *, marker: str | None = None
    ) -> bool:
        """Adds the results of keys that the file has not yet; whether it then has those of all.

        An exception is written as the key's failure, so that the others are still tried; `failures` counts them. When
        the file has everything, a line says so.

        Args:
            keys: of the stage.
            result: gives the fields of one key.
            scope: which of the keys are this process's, and until when.
            marker: what is said to be complete; None for the stage.
        """
        done = {row["key"] for row in self.rows()}
        number, parts = scope.part
        for key in keys[number::parts]:
            if key in done:
                continue
            if scope.deadline.passed:
                return False
            start = time.monotonic()
            try:
                fields = result(key)
                self.add(key, **fields, seconds=round(time.monotonic() - start, 2))
            except Exception as error:
                traceback.print_exc()
                self.add(key, failed=f"{type(error).__name__}: {error}"[:2000])
                self.failures += 1
        whole = {row["key"] for row in self.rows()}.issuperset(keys)
        if whole:
            self._write({"stage": marker or self.stage, "complete": True})
        return whole

    def _write(self, row: Row) -> None:
        line = json.dumps(row) + "\n"
        if self._path is None:
            self._written.append(row)
            sys.stdout.write(line)
            sys.stdout.flush()
            return
        with self._path.open("a", encoding="utf-8") as file:
            if file.tell() and not self._path.read_text(encoding="utf-8").endswith("\n"):
                line = "\n" + line  # behind a line that was cut off
            file.write(line)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file of results, without lines that were cut off; none when there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the process was ended in the middle of a write
            continue
    return rows
