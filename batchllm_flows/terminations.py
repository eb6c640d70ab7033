"""A flow run that is terminated says so to Prefect's server before its process ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.exceptions import TerminationSignal

_RUNNERS_VARIABLE = "PREFECT__FLOW_RUN_ID"
"""Set where a runner or worker of Prefect has started this process: it tells the server how the run has ended."""


@contextmanager
def ended_by_exit() -> Iterator[None]:
    """Let SIGTERM leave the block as `SystemExit` with the code that a shell would give, 143.

    Prefect's engine (3.7) answers its own exception for SIGTERM by killing the process before the run is reported, so
    that it would stay Running for ever; any other exception is reported as a crash, and all that is open is closed.
    """
    try:
        yield
    except TerminationSignal as signal:
        if _RUNNERS_VARIABLE in os.environ:
            raise
        raise SystemExit(128 + signal.signal) from signal
