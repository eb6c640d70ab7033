"""Loops over arrays at the speed of the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Loop = TypeVar("Loop", bound=Callable[..., Any])


def compiled(loop: Loop) -> Loop:
    """Compile a function over arrays and numbers at its first call.

    The machine code is kept on disk for the next process, and runs without the interpreter lock.
    """
    return cast(Loop, numba.njit(cache=True, nogil=True)(loop))
