"""Bisection over requests, pure; engines that really die are in `test_poison`."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm_operators.errors import TerminalError, TransientError
from batchllm_operators.execute.isolation import MOST_GUILTY, EngineDiedError, find_guilty


class Engines:
    """Computes rows in order, as many at a time as it is told; dies when one of these is poison."""

    def __init__(self, rows: list[int], poison: set[int], together: int = 3) -> None:
        self.left = set(rows)
        self.poison = poison
        self.together = together
        self.deaths = 0

    def compute(self, first: int, stop: int) -> None:
        asked = sorted(row for row in self.left if first <= row < stop)
        for start in range(0, len(asked), self.together):
            held = asked[start : start + self.together]
            if self.poison & set(held):
                self.deaths += 1
                raise EngineDiedError("killed by signal 9", bundle="b")
            self.left -= set(held)


@given(
    rows=st.sets(st.integers(0, 400), min_size=1).map(sorted),
    picks=st.sets(st.integers(0, 10_000), max_size=MOST_GUILTY),
    together=st.integers(1, 64),
)
def test_every_guilty_request_is_found_and_every_other_one_is_computed(
    rows: list[int], picks: set[int], together: int
) -> None:
    poison = {rows[pick % len(rows)] for pick in picks}
    engines = Engines(rows, poison, together)
    guilty = find_guilty(rows, engines.compute)
    assert {one.row for one in guilty} == poison == engines.left
    assert engines.deaths <= len(poison) * max(1, math.ceil(math.log2(len(rows))))


def test_the_death_of_the_lone_request_is_its_verdict() -> None:
    (one,) = find_guilty([7], Engines([7], {7}).compute)
    assert one.error.message == "killed by signal 9"


def test_nothing_unfinished_is_nothing_to_find() -> None:
    assert find_guilty([], Engines([], set()).compute) == []


def test_engines_that_die_on_everything_are_at_fault_themselves() -> None:
    rows = list(range(100))
    engines = Engines(rows, set(rows))
    with pytest.raises(TerminalError, match=r"seem to be at fault.*signal 9") as caught:
        find_guilty(rows, engines.compute)
    assert caught.value.bundle == "b"
    assert engines.deaths <= 2 * math.ceil(math.log2(100)) + MOST_GUILTY


def test_other_faults_are_not_taken_for_a_death() -> None:
    def compute(first: int, stop: int) -> None:
        raise TransientError("the store does not answer")

    with pytest.raises(TransientError, match="store"):
        find_guilty([1, 2, 3], compute)
