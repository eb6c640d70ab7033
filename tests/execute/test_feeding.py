from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from batchllm_operators.errors import DamagedObjectError, RowError, RowErrorCode, TerminalError
from batchllm_operators.execute.bundle_run import BundleRun
from batchllm_operators.execute.engine import Engine, Request
from batchllm_operators.execute.feeding import BundleFeed, BundleStep, count, read_requests, read_rows
from batchllm_operators.specs.sampling import SamplingParameters
from batchllm_operators.tasks import Answer
from batchllm_operators.work.bundles import bundle_keys

SAMPLING = SamplingParameters(temperature=0.5, stop=("end",))


class StepByStepEngine:
    """Finishes one request a step, in order; refuses empty prompts. Shows what feeding does, which vLLM hides."""

    capacity = 4

    def __init__(self) -> None:
        self.held: list[Request] = []
        self.most_held = 0
        self.aborted: list[bytes] = []

    @property
    def unfinished(self) -> int:
        return len(self.held)

    def submit(self, request: Request) -> Answer | None:
        if not request.prompt_token_ids:
            return Answer(request.key, error=RowError(RowErrorCode.ENGINE_ERROR, "empty"))
        assert request.key not in {one.key for one in self.held}
        self.held.append(request)
        self.most_held = max(self.most_held, len(self.held))
        return None

    def step(self) -> list[Answer]:
        done = self.held.pop(0)
        return [Answer(done.key, ([1], "a", "stop"), 3, 2, 1)]

    def abort(self, keys: Collection[bytes]) -> None:
        self.aborted += [request.key for request in self.held if request.key in keys]
        self.held = [request for request in self.held if request.key not in keys]

    def close(self) -> None: ...


def requests(count: int, *, empty: int = -1, first: int = 0) -> Iterator[Request]:
    for number in range(first, first + count):
        yield Request(number.to_bytes(16, "big"), [] if number == empty else [1, 2, 3], SAMPLING)


def run(feed: BundleFeed) -> list[BundleStep]:
    """All steps until the feed is empty."""
    steps: list[BundleStep] = []
    while feed.busy:
        steps += feed.step()
    return steps


def finished(steps: list[BundleStep], bundle: str = "a") -> list[int]:
    """Numbers of the requests of a bundle in the order in which they finished."""
    return [int.from_bytes(one.request_key, "big") for step in steps if step.bundle == bundle for one in step.finished]


def fed(engine: Engine, **bundles: Iterator[Request]) -> BundleFeed:
    feed = BundleFeed(engine)
    for name, its in bundles.items():
        feed.add(name, its)
    return feed


def test_the_engine_holds_no_more_than_its_capacity_and_answers_all() -> None:
    engine = StepByStepEngine()
    assert finished(run(fed(engine, a=requests(20)))) == list(range(20))
    assert engine.most_held == engine.capacity
    assert not engine.aborted


def test_requests_are_read_only_when_there_is_room_for_them() -> None:
    read = requests(20)
    fed(StepByStepEngine(), a=read).step()
    assert next(read).key == (4).to_bytes(16, "big")


def test_the_next_bundle_enters_as_the_one_before_leaves_and_answers_go_to_their_own() -> None:
    engine = StepByStepEngine()
    held: list[int] = []
    feed = fed(engine, a=requests(6), b=requests(6, first=100), c=requests(2, first=200))
    steps = []
    while feed.busy:
        steps += feed.step()
        held.append(engine.unfinished)
    assert finished(steps, "a") == list(range(6))
    assert finished(steps, "b") == list(range(100, 106))
    assert finished(steps, "c") == [200, 201]
    # One finishes a step, and until the last requests are read there is always another in its place.
    assert held == [3] * 11 + [2, 1, 0]
    first_of_b = next(place for place, step in enumerate(steps) if step.bundle == "b" and step.finished)
    last_of_a = next(place for place, step in enumerate(steps) if step.bundle == "a" and step.done)
    assert first_of_b > last_of_a


def test_a_bundle_says_once_it_is_read_and_once_it_is_done() -> None:
    steps = run(fed(StepByStepEngine(), a=requests(6)))
    assert [step.all_read for step in steps] == [False, False, False, True, True, True]
    assert [step.done for step in steps] == [False] * 5 + [True]


def test_a_refused_request_is_among_the_completions() -> None:
    steps = run(fed(StepByStepEngine(), a=requests(6, empty=2)))
    assert sorted(finished(steps)) == list(range(6))
    assert count(one for step in steps for one in step.finished).model_dump() == {
        "requests": 6,
        "errors": 1,
        "prompt_tokens": 15,
        "cached_tokens": 10,
        "completion_tokens": 5,
    }


def test_a_bundle_that_cannot_be_read_further_leaves_the_others_alone() -> None:
    def broken() -> Iterator[Request]:
        yield from requests(2)
        raise TerminalError("damaged")

    steps = run(fed(StepByStepEngine(), a=broken(), b=requests(5, first=100)))
    (fault,) = [step for step in steps if step.fault is not None]
    assert (fault.bundle, fault.done, str(fault.fault)) == ("a", True, "damaged")
    assert finished(steps, "b") == list(range(100, 105))


def test_a_dropped_bundle_leaves_the_engine_and_may_come_again() -> None:
    engine = StepByStepEngine()
    feed = fed(engine, a=requests(4), b=requests(3, first=100))
    feed.step()
    feed.drop("a")
    assert len(engine.aborted) == 3
    assert finished(run(feed), "a") == []
    feed = fed(engine, a=requests(4), b=requests(3, first=100))
    steps = feed.step()
    feed.drop("a")
    feed.add("a", requests(4))
    steps += run(feed)
    assert sorted(finished(steps)) == [0, 0, 1, 2, 3]
    assert finished(steps, "b") == [100, 101, 102]


def test_an_abort_leaves_the_engine_free() -> None:
    engine = StepByStepEngine()
    feed = fed(engine, a=requests(20))
    feed.step()
    feed.abort()
    assert len(engine.aborted) == 3
    assert (engine.unfinished, feed.busy) == (0, False)


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
    (step,) = run(fed(StepByStepEngine(), a=left))
    assert (step.finished, step.all_read, step.done) == ([], True, True)


def test_some_rows_of_a_bundle_are_counted_with_those_that_are_done(work: Any) -> None:
    bundle = work.write_bundle(requests=600)
    done = {work.key(number) for number in range(250, 260)}
    found = [request.key for request in read_rows(work.store, bundle.name, SAMPLING, done, (245, 300))]
    assert found == [work.key(number) for number in [*range(245, 250), *range(260, 300)]]
    assert bundle_keys(work.store, bundle.name) == [work.key(number) for number in range(600)]


def test_no_flipped_bit_of_a_bundle_is_ever_computed(work: Any) -> None:
    bundle = work.write_bundle(requests=4)
    command, whole = work.run_command(bundle), work.store.read_bytes(bundle.name)
    with ThreadPoolExecutor(1) as writing:
        assert len(list(BundleRun(command, print, writing).requests)) == 4
        for place in range(0, len(whole), 5):
            work.store.write_bytes(
                bundle.name, whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :]
            )
            with pytest.raises(DamagedObjectError, match="run again: the plan is made anew"):
                BundleRun(command, print, writing)
