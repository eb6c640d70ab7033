"""The server that a run needs: none of it starts one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from unittest import mock

import httpx
import pytest
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, temporary_settings

from batchllm_flows.prefect_server import STARTUP_VARIABLE, prepare_prefect, require_server
from batchllm_operators.errors import TerminalError


@pytest.fixture
def environment() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        os.environ.pop(STARTUP_VARIABLE, None)
        yield


@pytest.fixture
def starting(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], list[int | None]]:
    """Makes the temporary server do something else than start; returns the timeouts it is started with."""

    def replace(start: Callable[[], None]) -> list[int | None]:
        timeouts: list[int | None] = []

        def started(self: SubprocessASGIServer, timeout: int | None = None) -> None:
            self.port = 9
            timeouts.append(timeout)
            start()

        monkeypatch.setattr(SubprocessASGIServer, "start", started)
        # The server of the whole session is one of these: what a test starts and stops must be another.
        monkeypatch.setattr(SubprocessASGIServer, "_instances", {})
        return timeouts

    return replace


@pytest.mark.usefixtures("environment")
def test_a_temporary_server_gets_120_seconds_unless_the_user_says_otherwise() -> None:
    prepare_prefect(None)
    assert os.environ[STARTUP_VARIABLE] == "120"
    os.environ[STARTUP_VARIABLE] = "300"
    prepare_prefect(None)
    assert os.environ[STARTUP_VARIABLE] == "300"
    prepare_prefect(45)
    assert os.environ[STARTUP_VARIABLE] == "45"


def test_a_server_that_is_set_and_does_not_answer_is_told_in_a_line() -> None:
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(TerminalError, match=r"http://127.0.0.1:9/api does not answer \(ConnectError\): start it"),
    ):
        require_server()


def test_a_temporary_server_that_does_not_come_up_is_told_with_the_way_out(
    starting: Callable[[Callable[[], None]], list[int | None]],
) -> None:
    def timed_out() -> None:
        raise RuntimeError("Timed out while attempting to connect to ephemeral Prefect API server.")

    timeouts = starting(timed_out)
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(TerminalError, match=r"no temporary Prefect server after \d+ s.*--server-timeout.*server start"),
    ):
        require_server()
    assert len(timeouts) == 1
    assert timeouts[0]


def test_a_temporary_server_too_busy_to_answer_at_once_is_waited_for(
    starting: Callable[[Callable[[], None]], list[int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy() -> None:
        raise httpx.ReadTimeout("5 s are over")

    answers = [httpx.ReadTimeout("again"), httpx.Response(200, request=httpx.Request("GET", "http://127.0.0.1:9"))]

    def get(url: str, **_: object) -> httpx.Response:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    starting(busy)
    monkeypatch.setattr(httpx, "get", get)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        require_server()
    assert SubprocessASGIServer().running
    SubprocessASGIServer().stop()
    assert not answers
