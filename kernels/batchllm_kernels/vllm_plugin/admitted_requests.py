"""A table of the requests that run, kept in columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from batchllm_kernels.arrays import Int64s

if TYPE_CHECKING:
    from vllm.v1.request import Request


_ESTIMATE, _MOST, _SHARED, _PROMPT_TAIL, _RUN, _TAIL, _TO_COME, _WORK = range(8)


class AdmittedRequests:
    """A table with a row for each request, in no order: one vector operation reads or changes a column of all requests.

    A column is a view, valid until a request is added or removed.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._rows: dict[str, int] = {}
        self._table = np.zeros((8, 64), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._rows

    def row(self, request_id: str) -> int:
        """The index of the request in every column, valid until a request is removed."""
        return self._rows[request_id]

    @property
    def estimates(self) -> Int64s:
        """Output tokens that the plan expects, at least 1; int64 [R]."""
        return self._column(_ESTIMATE)

    @property
    def most(self) -> Int64s:
        """Output tokens at which a request ends in any case; int64 [R]."""
        return self._column(_MOST)

    @property
    def runs(self) -> Int64s:
        """Number of the run of `ResidentBlocks` where its chain ends; int64 [R]."""
        return self._column(_RUN)

    @property
    def tails(self) -> Int64s:
        """Tokens behind the full prompt blocks, as `read_tails` found them; int64 [R]."""
        return self._column(_TAIL)

    @property
    def generated(self) -> Int64s:
        """Output tokens so far, with those that steps under way will bring (async scheduling); int64 [R]."""
        return self._column(_TAIL) - self._column(_PROMPT_TAIL)

    @property
    def to_come(self) -> Int64s:
        """Output tokens that are still expected, at least 1; int64 [R], written by the owner of the table."""
        return self._column(_TO_COME)

    @property
    def work(self) -> Int64s:
        """Blocks that each request alone holds times the steps it holds them, as expected when it began.

        int64 [R], written by the owner of the table.
        """
        return self._column(_WORK)

    def tail(self, request: Request) -> int:
        """How many tokens the request has behind its full prompt blocks now."""
        return _tokens(request) - int(self._table[_SHARED, self._rows[request.request_id]])

    def add(self, request: Request, *, estimate: int, most: int, shared_tokens: int, run: int) -> None:
        """Give a request the last row, with the tail that it has now.

        Args:
            request: a request that has no row yet.
            estimate: output tokens that the plan expects, at least 1.
            most: output tokens at which the request ends in any case.
            shared_tokens: tokens of the full prompt blocks that it may share.
            run: number of the run of `ResidentBlocks` where the chain of these blocks ends.
        """
        row = len(self._requests)
        if row == self._table.shape[1]:
            self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
        prompt_tail = request.num_prompt_tokens - shared_tokens
        self._table[:, row] = (estimate, most, shared_tokens, prompt_tail, run, _tokens(request) - shared_tokens, 0, 0)
        self._requests.append(request)
        self._rows[request.request_id] = row

    def remove(self, request_id: str) -> None:
        """Remove the row of a request; the last row moves into its place."""
        row = self._rows.pop(request_id)
        last = self._requests.pop()
        if row < len(self._requests):
            self._requests[row] = last
            self._rows[last.request_id] = row
            self._table[:, row] = self._table[:, len(self._requests)]

    def read_tails(self, prefilling: Iterable[Request]) -> None:
        """Ask all requests how many tokens they have now.

        Args:
            prefilling: requests with more than a token to compute before they generate. All other requests have
                computed all but their last token, steps under way included.
        """
        computed = [one.num_computed_tokens for one in self._requests]
        self.tails[:] = np.array(computed, dtype=np.int64) + 1 - self._column(_SHARED)
        for one in prefilling:
            self.tails[self._rows[one.request_id]] = self.tail(one)

    def _column(self, of: int) -> Int64s:
        return self._table[of, : len(self._requests)]


def _tokens(request: Request) -> int:
    """Tokens of the prompt and the output, with those that steps under way will bring (async scheduling)."""
    return int(request.num_tokens + request.num_output_placeholders)
