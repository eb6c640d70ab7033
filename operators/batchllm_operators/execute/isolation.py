"""Finding the request on which engines die: bisection over the unfinished requests of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batchllm_operators.errors import EngineDiedError, TerminalError

MOST_GUILTY = 4
"""Single requests of one bundle on which engines may die; with more, the engines are taken to be at fault."""


@dataclass(frozen=True, slots=True)
class GuiltyRequest:
    """A request on which an engine died that held no other."""

    row: int
    error: EngineDiedError


def find_guilty(rows: Sequence[int], compute: Callable[[int, int], None]) -> list[GuiltyRequest]:
    """Compute requests in ever smaller pieces, until those that cannot be computed stand alone.

    An engine dies at most once for each halving, so about log2 of the number of requests for each guilty one; what
    was finished before a death is not computed again.

    Args:
        rows: the unfinished requests, by their rows in the bundle, increasing.
        compute: computes the unfinished requests from a row up to before another.

    Raises:
        TerminalError: there are more guilty ones than `MOST_GUILTY`.
        Exception: what `compute` raises but `EngineDiedError`.
    """
    guilty: list[GuiltyRequest] = []
    pieces = _halves(rows)
    while pieces:
        piece = pieces.pop()
        try:
            compute(piece[0], piece[-1] + 1)
        except EngineDiedError as error:
            if len(piece) > 1:
                pieces += _halves(piece)
                continue
            guilty.append(GuiltyRequest(piece[0], error))
            if len(guilty) > MOST_GUILTY:
                raise TerminalError(
                    f"engines died on each of {len(guilty)} single requests: not the requests, but the engines seem "
                    f"to be at fault; the last: {error.message}",
                    bundle=error.bundle,
                ) from error
    return guilty


def _halves(rows: Sequence[int]) -> list[Sequence[int]]:
    """The two halves, the second before the first, as a stack takes them; without empty ones."""
    middle = (len(rows) + 1) // 2
    return [half for half in (rows[middle:], rows[:middle]) if half]
