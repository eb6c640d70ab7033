from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from batchllm_operators.errors import RowError, RowErrorCode
from batchllm_operators.execute.engine import Completion, Request
from batchllm_operators.execute.feeding import completions, count, read_requests
from batchllm_operators.stage.spec import SamplingParameters

SAMPLING = SamplingParameters(temperature=0.5, stop=("end",))


class StepByStepEngine:
    """Finishes one request a step, in order; refuses empty prompts. Shows what feeding does, which vLLM hides."""

    capacity = 4

    def __init__(self) -> None:
        self.held: list[Request] = []
        self.most_held = 0
        self.aborted = False

    @property
    def unfinished(self) -> int:
        return len(self.held)

    def submit(self, request: Request) -> Completion | None:
        if not request.prompt_token_ids:
            return Completion(request.key, error=RowError(RowErrorCode.ENGINE_ERROR, "empty"))
        self.held.append(request)
        self.most_held = max(self.most_held, len(self.held))
        return None

    def step(self) -> list[Completion]:
        done = self.held.pop(0)
        return [Completion(done.key, [1], "a", "stop", prompt_tokens=3, cached_tokens=2, completion_tokens=1)]

    def abort(self) -> None:
        self.held.clear()
        self.aborted = True

    def close(self) -> None: ...


def requests(count: int, empty: int = -1) -> Iterator[Request]:
    for number in range(count):
        yield Request(number.to_bytes(16, "big"), [] if number == empty else [1, 2, 3], SAMPLING)


def test_the_engine_holds_no_more_than_its_capacity_and_answers_all() -> None:
    engine = StepByStepEngine()
    finished = [one for step in completions(engine, requests(20), lambda: False) for one in step]
    assert [int.from_bytes(one.request_key, "big") for one in finished] == list(range(20))
    assert engine.most_held == engine.capacity
    assert not engine.aborted


def test_requests_are_read_only_when_there_is_room_for_them() -> None:
    read = requests(20)
    steps = completions(StepByStepEngine(), read, lambda: False)
    next(steps)
    assert next(read).key == (4).to_bytes(16, "big")


def test_a_refused_request_is_among_the_completions() -> None:
    finished = [one for step in completions(StepByStepEngine(), requests(6, empty=2), lambda: False) for one in step]
    assert len(finished) == 6
    assert count(finished).model_dump() == {
        "requests": 6,
        "errors": 1,
        "prompt_tokens": 15,
        "cached_tokens": 10,
        "completion_tokens": 5,
    }


def test_a_stop_between_two_steps_aborts_what_is_unfinished() -> None:
    engine = StepByStepEngine()
    seen: list[Completion] = []
    steps = completions(engine, requests(20), lambda: len(seen) >= 3)
    for step in steps:
        seen += step
    assert len(seen) == 3
    assert engine.aborted
    assert engine.unfinished == 0


def test_a_caller_that_fails_leaves_the_engine_free() -> None:
    engine = StepByStepEngine()
    steps = completions(engine, requests(20), lambda: False)
    next(steps)
    steps.close()
    assert engine.unfinished == 0


def test_requests_come_in_the_order_of_the_bundle_without_those_that_are_done(work: Any) -> None:
    bundle = work.write_bundle(requests=600)
    done = {work.key(number) for number in range(0, 600, 3)}
    found = [request.key for request in read_requests(work.store, bundle.name, SAMPLING, done)]
    assert found == [work.key(number) for number in range(600) if number % 3]


def test_a_row_overrides_the_sampling_of_the_job_field_by_field(work: Any) -> None:
    bundle = work.write_bundle(requests=2, max_tokens=9, sampling={1: '{"top_p": 0.25, "max_tokens": 7}'})
    plain, changed = read_requests(work.store, bundle.name, SAMPLING, set())
    assert plain.sampling == SamplingParameters(temperature=0.5, stop=("end",), max_tokens=9)
    assert changed.sampling == SamplingParameters(temperature=0.5, stop=("end",), max_tokens=9, top_p=0.25)


@pytest.mark.parametrize("empty", [True, False])
def test_a_bundle_with_nothing_left_to_do_ends_at_once(work: Any, empty: bool) -> None:
    bundle = work.write_bundle(requests=0 if empty else 5)
    done = {work.key(number) for number in range(5)}
    left = read_requests(work.store, bundle.name, SAMPLING, done)
    assert [one for step in completions(StepByStepEngine(), left, lambda: False) for one in step] == []
