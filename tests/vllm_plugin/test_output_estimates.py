"""Expected output lengths, before and after real ones are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm_kernels.vllm_plugin.output_estimates import FEWEST, WINDOW, LearntEstimates


def expected(learned: LearntEstimates, estimate: int, generated: int = 0, most: int = 10_000) -> int:
    columns = [np.array([value], dtype=np.int64) for value in (estimate, generated, most)]
    return int(learned.expected(*columns)[0])


def taught(pairs: list[tuple[int, int]]) -> LearntEstimates:
    learned = LearntEstimates()
    for estimate, actual in pairs:
        learned.observe(estimate, actual)
    return learned


def test_estimates_are_taken_as_they_are_until_enough_requests_have_ended() -> None:
    assert expected(taught([(100, 300)] * (FEWEST - 1)), 100) == 100
    assert expected(taught([(100, 300)] * FEWEST), 100) == 300


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_a_constant_error_is_corrected(factor: float) -> None:
    learned = taught([(estimate, int(estimate * factor)) for estimate in range(10, 10 + 2 * FEWEST, 2)])
    assert expected(learned, 200) == 200 * factor


def test_a_request_is_compared_with_those_that_got_as_far() -> None:
    learned = taught([(100, 50)] * FEWEST + [(100, 200)] * FEWEST)
    assert expected(learned, 100) == 125
    assert expected(learned, 100, generated=60) == 200


def test_lengths_are_known_when_enough_estimates_were_off_by_the_same_factor() -> None:
    assert not taught([(100, 100)] * (FEWEST - 1)).are_steady
    assert taught([(100, 200)] * FEWEST).are_steady
    assert taught([(100, 100)] * 9 * FEWEST + [(100, 300)] * (FEWEST // 2)).are_steady, "some exceptions do not matter"
    assert not taught([(100, 100), (100, 300)] * FEWEST).are_steady


def test_only_the_latest_requests_count() -> None:
    learned = taught([(100, 1000)] * WINDOW + [(100, 100)] * WINDOW)
    assert expected(learned, 40) == 40


def test_a_request_that_outgrew_all_that_is_known_is_expected_to_go_on_growing() -> None:
    assert expected(taught([]), 100, generated=100) == 126
    assert expected(taught([(100, 100)] * FEWEST), 100, generated=400) == 501


rows = st.tuples(st.integers(1, 500), st.integers(0, 500), st.integers(1, 500))


@given(known=st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), max_size=60), asked=st.lists(rows, max_size=9))
def test_expectations_lie_between_what_is_there_and_what_is_allowed(
    known: list[tuple[int, int]], asked: list[tuple[int, int, int]]
) -> None:
    asked = [(estimate, min(generated, most), most) for estimate, generated, most in asked]
    estimates, generated, most = np.array(asked, dtype=np.int64).reshape(-1, 3).T
    found = taught(known).expected(estimates, generated, most)
    assert found.dtype == np.int64
    assert np.all(found >= generated)
    assert np.all(found <= most)
