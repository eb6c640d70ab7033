"""Estimates of output lengths."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from batchllm_operators.plan.output_lengths import EstimateSource, OutputEstimates, estimate_output_tokens

NONE: list[int] = []


def estimate(
    max_tokens: list[int],
    *,
    row: list[int] | None = None,
    group: list[int] | None = None,
    known: list[int] | None = None,
    observed: list[int] = NONE,
) -> OutputEstimates:
    missing = [-1] * len(max_tokens)
    columns = [max_tokens, row or missing, group or missing, known or missing, observed]
    return estimate_output_tokens(*(np.array(column, dtype=np.int32) for column in columns))


def sources(estimates: OutputEstimates) -> list[EstimateSource]:
    return [EstimateSource(source) for source in estimates.source]


def test_nothing_known_means_max_tokens() -> None:
    estimates = estimate([10, 300])
    assert estimates.tokens.tolist() == [10, 300]
    assert sources(estimates) == [EstimateSource.MAX_TOKENS] * 2


def test_results_of_the_job_give_their_mean_within_max_tokens() -> None:
    estimates = estimate([100, 20], observed=[10, 30, 50])
    assert estimates.tokens.tolist() == [30, 17]
    assert sources(estimates) == [EstimateSource.JOB] * 2


def test_results_of_a_group_outweigh_those_of_the_job_as_they_grow() -> None:
    observed = [10] * 96 + [90] * 4
    few = estimate([100] * 5, group=[0] * 5, known=[90, -1, -1, -1, -1], observed=observed)
    many = estimate([100] * 5, group=[0] * 5, known=[90, 90, 90, 90, -1], observed=observed)
    assert 13 < few.tokens[1] < many.tokens[4] < 90
    assert sources(many) == [EstimateSource.SAME_REQUEST] * 4 + [EstimateSource.GROUP]


def test_the_same_request_has_the_length_it_had() -> None:
    assert estimate([100], group=[0], known=[42], observed=[42, 7]).tokens.tolist() == [42]


def test_the_row_knows_best_and_absurd_numbers_stay_within_bounds() -> None:
    estimates = estimate([100, 100, 100, 100], row=[5, 0, 10**9, -7], known=[50, -1, -1, -1], observed=[50])
    assert estimates.tokens.tolist() == [5, 1, 100, 50]
    assert sources(estimates) == [EstimateSource.ROW] * 3 + [EstimateSource.JOB]


@given(st.lists(st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 3), max_size=8), st.lists(st.integers(0, 5000)))
def test_every_estimate_lies_within_one_and_max_tokens(rows: list[tuple[int, int, int]], observed: list[int]) -> None:
    limits = [abs(limit) % 4096 + 1 for limit, _, _ in rows]
    estimates = estimate(limits, row=[one for _, one, _ in rows], known=[one for _, _, one in rows], observed=observed)
    assert all(1 <= tokens <= limit for tokens, limit in zip(estimates.tokens, limits, strict=True))
