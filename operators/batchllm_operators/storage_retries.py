"""How requests to object stores are tried again, in one place: by botocore, and by s3fs for bodies that break off.

Botocore's standard mode tries again after timeouts, resets, throttling (503 SlowDown, 429) and 5xx, with exponential
pauses up to 20 s and full jitter, as long as retries are not most of what is sent. 403 and 404 fail at once. s3fs does
the same around the whole answer, whose body may break off or be short. What fails then is a `TransientError`, after
which tasks are tried again (`retry`).
"""

from __future__ import annotations

from typing import Any

ATTEMPTS = 8
"""Attempts at one request before botocore gives up: about a minute of pauses."""
READ_SECONDS = 60
CONNECT_SECONDS = 20

_counts = {"requests": 0, "attempts": 0}


def client_settings() -> dict[str, Any]:
    """What the client of an object store is made with."""
    return {
        "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
        "read_timeout": READ_SECONDS,
        "connect_timeout": CONNECT_SECONDS,
    }


def counted_session(profile: str | None) -> Any:
    """A session whose requests and attempts are counted."""
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    session = AioSession(profile=profile)
    session.register("before-call.s3", _count("requests"))
    session.register("before-send.s3", _count("attempts"))
    return session


def storage_retries() -> int:
    """Requests that this process has sent to object stores again so far."""
    return max(0, _counts["attempts"] - _counts["requests"])


def _count(name: str) -> Any:
    def count(**_arguments: Any) -> None:
        _counts[name] += 1

    return count
