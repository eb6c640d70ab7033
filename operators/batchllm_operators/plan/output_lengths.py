"""How many tokens each completion will probably have.

What is known best is taken: the row's own estimate; the length that the same request had in an earlier run; what an
earlier run, or the results so far (a pilot), show of the group and of all requests; else `max_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from batchllm_operators.columns.arrays import Floats, Int8s, Int32s

PRIOR_WEIGHT = 4
"""So many results of a group weigh as much as what all results show."""


class EstimateSource(IntEnum):
    """Where an estimate comes from."""

    ROW = 0
    SAME_REQUEST = 1
    GROUP = 2
    JOB = 3
    MAX_TOKENS = 4


@dataclass(frozen=True, slots=True)
class OutputEstimates:
    """Expected output tokens of N requests.

    Attributes:
        tokens: int32 [N], from 1 to the request's `max_tokens`.
        source: int8 [N], `EstimateSource`.
    """

    tokens: Int32s
    source: Int8s


def estimate_output_tokens(
    max_tokens: Int32s, row_estimate: Int32s, group: Int32s, known: Int32s, observed: Int32s
) -> OutputEstimates:
    """Estimate the output tokens of N requests.

    Args:
        max_tokens: int32 [N], the most each may give.
        row_estimate: int32 [N], what the row says; below 0 where it says nothing. Any other number is taken, within
            1 and `max_tokens`.
        group: int32 [N], number of the prefix group; -1 for a request alone.
        known: int32 [N], output tokens that the same request had; -1 where it has not been answered.
        observed: int32 [M], output tokens of all requests answered so far, of this job or an earlier run of it.
    """
    tokens = max_tokens.astype(np.float64)
    source = np.full(len(max_tokens), EstimateSource.MAX_TOKENS, dtype=np.int8)
    if len(observed):
        tokens = _mean_within(observed, max_tokens)
        source[:] = EstimateSource.JOB
        answered = (known >= 0) & (group >= 0)
        groups = int(group.max(initial=-1)) + 1
        results = np.append(np.bincount(group[answered], minlength=groups), 0)[group]
        total = np.append(np.bincount(group[answered], weights=known[answered], minlength=groups), 0)[group]
        tokens = (total + PRIOR_WEIGHT * tokens) / (results + PRIOR_WEIGHT)
        source[results > 0] = EstimateSource.GROUP
        tokens = np.where(known >= 0, known, tokens)
        source[known >= 0] = EstimateSource.SAME_REQUEST
    given = row_estimate >= 0
    tokens = np.where(given, row_estimate, tokens)
    source[given] = EstimateSource.ROW
    return OutputEstimates(np.clip(np.ceil(tokens), 1, np.maximum(max_tokens, 1)).astype(np.int32), source)


def _mean_within(observed: Int32s, bounds: Int32s) -> Floats:
    """Mean of the observed numbers, each cut at a bound; for every bound."""
    ordered = np.sort(observed)
    total = np.concatenate(([0.0], np.cumsum(ordered, dtype=np.float64)))
    below = np.searchsorted(ordered, bounds, side="right")
    return (total[below] + (len(ordered) - below) * bounds.astype(np.float64)) / len(ordered)
