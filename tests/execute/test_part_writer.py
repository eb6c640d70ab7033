from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from batchllm_operators.errors import RowError, RowErrorCode, TerminalError, TransientError
from batchllm_operators.execute.part_writer import QUEUED_PARTS, PartWriter
from batchllm_operators.store import Store
from batchllm_operators.tasks import Answer
from batchllm_operators.tasks.generate import GENERATION
from batchllm_operators.work.results import answers_table
from tests.generation import RESULT_SCHEMA


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Inline(Executor):
    """Writes at once, in the thread that asks."""

    def submit(self, call: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


class SlowStore(Store):
    """A store whose writes wait until they may go on."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.may_go_on = threading.Event()

    def write_bytes(self, name: str, content: bytes) -> None:
        assert self.may_go_on.wait(30)
        super().write_bytes(name, content)


class FailingStore(Store):
    """A store whose next writes fail: a fault that no real store gives on demand."""

    def __init__(self, uri: str, faults: list[Exception]) -> None:
        super().__init__(uri)
        self._faults = faults

    def write_bytes(self, name: str, content: bytes) -> None:
        if self._faults:
            raise self._faults.pop(0)
        super().write_bytes(name, content)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def answers(first: int, count: int) -> list[Answer]:
    return [
        Answer(number.to_bytes(16, "big"), ([1, 2], "text", "stop"), 9, 4, 2) for number in range(first, first + count)
    ]


def writer(store: Store, clock: Clock, **changes: Any) -> PartWriter:
    settings = {
        "part_rows": 10,
        "part_seconds": 30.0,
        "on_part": lambda _: None,
        "writing": Inline(),
        "clock": clock,
        **changes,
    }
    return PartWriter(store, GENERATION, **settings)


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
    failed = Answer(bytes(16), error=RowError(RowErrorCode.ENGINE_ERROR, "too long"))
    table = answers_table(GENERATION, [failed, *answers(1, 1)])
    assert table.schema == RESULT_SCHEMA
    first, second = table.to_pylist()
    assert first.pop("error") == {"code": "engine_error", "message": "too long"}
    assert first.pop("request_key") == bytes(16)
    assert set(first.values()) == {None}
    assert second["error"] is None
    assert second["output_token_ids"] == [1, 2]


@pytest.fixture
def thread() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


def test_who_adds_does_not_wait_for_the_store_until_it_is_several_parts_behind(
    tmp_path: Path, clock: Clock, thread: Executor
) -> None:
    store = SlowStore(str(tmp_path))
    parts = writer(store, clock, writing=thread)
    for number in range(1 + QUEUED_PARTS):
        parts.add(answers(10 * number, 10))
    assert (parts.parts, parts.idle) == ((), False)
    adding = threading.Thread(target=parts.add, args=(answers(100, 10),))
    adding.start()
    adding.join(0.2)
    assert adding.is_alive()
    store.may_go_on.set()
    adding.join(30)
    assert not adding.is_alive()
    parts.flush()
    assert parts.idle
    assert rows(store) == dict.fromkeys([*range(10 * (1 + QUEUED_PARTS)), *range(100, 110)], 1)


def test_a_fault_in_the_writing_thread_is_raised_by_the_next_call_and_keeps_the_rows(
    tmp_path: Path, clock: Clock, thread: Executor
) -> None:
    store = FailingStore(str(tmp_path), [TerminalError("denied")])
    parts = writer(store, clock, writing=thread)
    # Whichever call comes after the fault: that of `add` itself, when the thread is quick.
    with pytest.raises(TerminalError, match="denied"):
        parts.add(answers(0, 10))
        parts.flush()
    parts.add(answers(10, 3))
    parts.flush()
    assert rows(store) == dict.fromkeys(range(13), 1)


def test_handing_over_at_the_end_does_not_wait(tmp_path: Path, clock: Clock, thread: Executor) -> None:
    store = SlowStore(str(tmp_path))
    parts = writer(store, clock, writing=thread)
    parts.add(answers(0, 3))
    assert parts.idle
    parts.hand_over()
    assert not parts.idle
    store.may_go_on.set()
    parts.flush()
    assert rows(store) == dict.fromkeys(range(3), 1)
