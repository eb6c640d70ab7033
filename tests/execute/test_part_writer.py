from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchllm_operators.errors import RowError, RowErrorCode, TerminalError, TransientError
from batchllm_operators.execute.engine import Completion
from batchllm_operators.execute.part_writer import PartWriter, part_table
from batchllm_operators.records import RESULT_SCHEMA
from batchllm_operators.store import Store


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class FailingStore(Store):
    """A store whose next writes fail: a fault that no real store gives on demand."""

    def __init__(self, uri: str, faults: list[Exception]) -> None:
        super().__init__(uri)
        self._faults = faults

    def write_table(self, name: str, table: pa.Table) -> None:
        if self._faults:
            raise self._faults.pop(0)
        super().write_table(name, table)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def answers(first: int, count: int) -> list[Completion]:
    return [
        Completion(
            number.to_bytes(16, "big"), [1, 2], "text", "stop", prompt_tokens=9, cached_tokens=4, completion_tokens=2
        )
        for number in range(first, first + count)
    ]


def writer(store: Store, clock: Clock, **changes: Any) -> PartWriter:
    settings = {"part_rows": 10, "part_seconds": 30.0, "on_part": lambda _: None, "clock": clock, **changes}
    return PartWriter(store, **settings)


def rows(store: Store) -> dict[int, int]:
    """Request number to how often it stands in parts."""
    found: dict[int, int] = {}
    for name in store.names("results"):
        with store.parquet(name) as file:
            for row in file.read().to_pylist():
                number = int.from_bytes(row["request_key"], "big")
                found[number] = found.get(number, 0) + 1
    return found


def test_a_part_is_written_when_it_has_its_rows(store: Store, clock: Clock) -> None:
    told: list[str] = []
    parts = writer(store, clock, on_part=told.append)
    parts.add(answers(0, 9))
    assert store.names("results") == []
    parts.add(answers(9, 14))
    assert len(told) == 2
    parts.flush()
    assert parts.parts == tuple(told)
    assert sorted(told) == store.names("results")
    assert rows(store) == dict.fromkeys(range(23), 1)


def test_a_smaller_part_is_written_when_its_oldest_row_has_waited(store: Store, clock: Clock) -> None:
    parts = writer(store, clock)
    parts.add(answers(0, 1))
    clock.now += 29
    parts.add(answers(1, 1))
    assert parts.parts == ()
    clock.now += 1
    parts.add([])
    assert rows(store) == {0: 1, 1: 1}
    parts.add(answers(2, 1))
    clock.now += 29
    parts.add([])
    assert len(parts.parts) == 1


def test_flushing_nothing_writes_nothing(store: Store, clock: Clock) -> None:
    parts = writer(store, clock)
    parts.flush()
    clock.now += 1000
    parts.add([])
    assert store.names() == []


def test_a_transient_fault_is_waited_out_with_growing_pauses(tmp_path: Path, clock: Clock) -> None:
    pauses: list[float] = []
    store = FailingStore(str(tmp_path), [TransientError("busy"), TransientError("busy")])
    parts = writer(store, clock, sleep=pauses.append)
    parts.add(answers(0, 10))
    assert rows(store) == dict.fromkeys(range(10), 1)
    assert pauses == sorted(set(pauses))
    assert len(pauses) == 2


def test_a_lasting_fault_is_raised_and_keeps_the_rows_for_the_next_flush(tmp_path: Path, clock: Clock) -> None:
    store = FailingStore(str(tmp_path), [TransientError("busy")] * 4)
    parts = writer(store, clock, sleep=lambda _: None)
    with pytest.raises(TransientError, match="busy"):
        parts.add(answers(0, 10))
    assert parts.parts == ()
    parts.flush()
    assert rows(store) == dict.fromkeys(range(10), 1)


def test_a_terminal_fault_is_not_waited_out(tmp_path: Path, clock: Clock) -> None:
    pauses: list[float] = []
    parts = writer(FailingStore(str(tmp_path), [TerminalError("denied")]), clock, sleep=pauses.append)
    with pytest.raises(TerminalError, match="denied"):
        parts.add(answers(0, 10))
    assert pauses == []


def test_an_error_stands_in_its_row_with_null_tokens() -> None:
    failed = Completion(bytes(16), error=RowError(RowErrorCode.ENGINE_ERROR, "too long"))
    table = part_table([failed, *answers(1, 1)])
    assert table.schema == RESULT_SCHEMA
    first, second = table.to_pylist()
    assert first.pop("error") == {"code": "engine_error", "message": "too long"}
    assert first.pop("request_key") == bytes(16)
    assert set(first.values()) == {None}
    assert second["error"] is None
    assert second["output_token_ids"] == [1, 2]
