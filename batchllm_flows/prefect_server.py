"""The Prefect server that a run needs: the one that is set, or a temporary one that is waited for."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from batchllm_operators.errors import TerminalError

STARTUP_SECONDS = 120
PATIENCE_SECONDS = 1800.0
"""How long a run that has ended waits for a server that is gone."""
LOOK_SECONDS = 0.1
"""Between two looks whether a temporary server has begun."""
POLL_SECONDS = 5.0
"""Between two looks whether a server is back."""
STARTUP_VARIABLE = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"

OUR_LOGGERS = ("batchllm_flows", "batchllm_operators")
"""The loggers above those of all our modules."""

_WATCH = """
import os, signal, sys
server = os.pidfd_open(int(sys.argv[1]))
sys.stdin.buffer.read()
signal.pidfd_send_signal(server, signal.SIGTERM)
"""
_WATCHED_PIPES: list[int] = []
"""Descriptors that stay open as long as this process lives."""

_LOGGER = logging.getLogger(__name__)
_ADVICE = (
    "to use one that runs: `prefect server start` in another terminal, then "
    "PREFECT_API_URL=http://127.0.0.1:4200/api batchllm run ..."
)


def prepare_prefect(timeout_s: int | None) -> None:
    """Set what Prefect reads when it is imported; what the user has set stays.

    Args:
        timeout_s: seconds that a temporary server may take to start; None: as set, else `STARTUP_SECONDS`.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO")
    # What the steps warn of stands in the log of the flow run too; what is said outside of one is only printed.
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", ",".join(OUR_LOGGERS))
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    if timeout_s is not None:
        os.environ[STARTUP_VARIABLE] = str(timeout_s)
    os.environ.setdefault(STARTUP_VARIABLE, str(STARTUP_SECONDS))


def require_server() -> None:
    """Make sure that there is a server before any work is done: the one that is set, or a temporary one.

    A temporary server takes seconds to start, and a minute beside other work. It ends with this process.

    Raises:
        TerminalError: the server that is set does not answer, or no temporary server came up in time.
    """
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url is not None:
        _require_answer(settings.api.url)
        return
    timeout_s = settings.server.ephemeral.startup_timeout_seconds
    _LOGGER.info("waiting for a temporary Prefect server, up to %d s; %s", timeout_s, _ADVICE)
    _start_temporary_server(timeout_s)


@contextmanager
def no_heartbeat_to_temporary_server() -> Iterator[None]:
    """Flow runs within send no heartbeat where their server is a temporary one, which ends with them.

    Heartbeats let a server notice that a run has crashed; Prefect waits up to a second for their thread to end.
    """
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, get_current_settings, temporary_settings

    if get_current_settings().api.url is not None:
        yield
        return
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


@contextmanager
def reported_when_server_is_back(warn: Callable[..., None], patience_s: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Let a flow end only when Prefect's server answers, so that the end of the run is reported.

    Steps need no server: a run computes on while it is gone. Only its last state is lost, and with it the knowledge
    that it has ended, if the server does not answer within Prefect's own retries, which are a minute. A temporary
    server is not waited for: nobody starts it again.

    Args:
        warn: takes a warning, as `logging.Logger.warning`.
        patience_s: seconds to wait at most; then Prefect's own error ends the run.
    """
    try:
        yield
    except Exception:  # what interrupts or ends the process waits for nobody
        _wait_for_server(warn, patience_s)
        raise
    _wait_for_server(warn, patience_s)


def _wait_for_server(warn: Callable[..., None], patience_s: float) -> None:
    from prefect.settings import get_current_settings

    api_url = get_current_settings().api.url
    if api_url is None:
        return
    deadline, warned = time.monotonic() + patience_s, False
    while (error := _failure_to_answer()) is not None and time.monotonic() < deadline:
        if not warned:
            warn(
                "the run is over; Prefect's server at %s does not answer (%s), and is waited for up to %d min to tell"
                " it so", api_url, type(error).__name__, patience_s // 60,
            )  # fmt: skip
        warned = True
        time.sleep(POLL_SECONDS)


def _failure_to_answer() -> Exception | None:
    """Why the server that is set does not answer; None where it does, be it with an error."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    # Another answer than health is an answer: what the flow asks for says more about it.
    return error if isinstance(error, httpx.TransportError) else None


def _require_answer(api_url: str) -> None:
    error = _failure_to_answer()
    if error is not None:
        raise TerminalError(
            f"the Prefect server at {api_url} does not answer ({type(error).__name__}): start it with `prefect server "
            "start`, or unset PREFECT_API_URL for a temporary one"
        ) from error


def _start_temporary_server(timeout_s: int) -> None:
    import httpx
    from prefect.server.api.server import SubprocessASGIServer

    # The one that Prefect's clients ask for when no URL is set.
    server = SubprocessASGIServer()
    deadline = time.monotonic() + timeout_s
    watched: set[int] = set()

    def watch() -> None:
        """From its begin on: it takes seconds to start, and where its port is taken it begins anew."""
        process = server.server_process
        if process is not None and process.pid not in watched:
            watched.add(process.pid)
            _end_with_this_process(process)

    try:
        try:
            _without_interrupts(lambda: server.start(timeout_s), server.stop, watch)
        except httpx.TimeoutException:
            # It is there, but too busy to answer within httpx's few seconds, which Prefect takes for a failure.
            _wait_for_answer(f"{server.api_url}/health", deadline)
            server.running = True
    except (RuntimeError, httpx.HTTPError) as error:
        server.stop()
        raise TerminalError(
            f"no temporary Prefect server after {timeout_s} s ({type(error).__name__}): give it longer with "
            f"--server-timeout; {_ADVICE}"
        ) from error


def _end_with_this_process(server: subprocess.Popen[Any]) -> None:
    """Let the server end with this process also where that is killed and cannot end it.

    A process of its own waits for the end of a pipe that nobody writes to. It holds the server by a descriptor, so that
    it never ends another process that got the server's number.
    """
    reading, writing = os.pipe()  # which closes when this process ends, however it does
    try:
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCH, str(server.pid)],
            stdin=reading,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    finally:
        os.close(reading)
    _WATCHED_PIPES.append(writing)


def _without_interrupts(start: Callable[[], None], stop: Callable[[], None], look: Callable[[], None]) -> None:
    """Start a process that Ctrl-C does not reach, in another thread, so that it ends the waiting here.

    A terminal sends Ctrl-C to all processes of a command. Prefect's server would end at once, and the flow run, which
    tells it that it was interrupted, would try for minutes. A process inherits the signals that its thread blocks.

    Args:
        start: starts it and waits until it is up.
        stop: ends it.
        look: is called again and again meanwhile, and once more when it is up.
    """
    failed: list[BaseException] = []

    def blocking() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            start()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=blocking, name="prefect-server", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
            look()
    except KeyboardInterrupt:
        stop()
        raise
    if failed:
        raise failed[0]


def _wait_for_answer(url: str, deadline: float) -> None:
    import httpx

    while True:
        try:
            httpx.get(url, timeout=max(deadline - time.monotonic(), 1.0)).raise_for_status()
        except httpx.TransportError:
            if time.monotonic() >= deadline:
                raise
        else:
            return
