"""Live progress on a real Prefect API that answers, and that does not."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from batchllm_flows.live import LiveProgress
from batchllm_operators.execute.messages import BundleCounts
from batchllm_operators.execute.progress import ProgressBoard
from tests.flows.reports import a_plan

PATIENCE_SECONDS = 60


@dataclass
class UnreliableApi:
    """Passes requests on to the real Prefect API; while broken, answers 500 instead."""

    target: str
    broken: bool = False
    refused: list[str] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        content = request.rfile.read(int(request.headers.get("content-length", 0)))
        if self.broken:
            self.refused.append(request.path)
            request.send_error(500)
            return
        headers = {name: value for name, value in request.headers.items() if name.lower() != "host"}
        answer = httpx.request(request.command, self.target + request.path, content=content, headers=headers)
        request.send_response(answer.status_code)
        for name in ("content-type", "location"):
            if name in answer.headers:
                request.send_header(name, answer.headers[name])
        request.send_header("content-length", str(len(answer.content)))
        request.end_headers()
        request.wfile.write(answer.content)


@pytest.fixture
def api(prefect_server: None) -> Iterator[UnreliableApi]:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    unreliable = UnreliableApi(str(PREFECT_API_URL.value()).removesuffix("/api"))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            unreliable.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    for method in ("GET", "POST", "PATCH"):
        setattr(Handler, f"do_{method}", Handler.forward)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}/api"}):
        yield unreliable
    server.shutdown()
    server.server_close()


def shown(key: str) -> float | None:
    from prefect.artifacts import Artifact

    found = Artifact.get(key)
    return None if found is None else float(str(found.data))


def wait_for(reached: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert time.monotonic() < until, "not in time"
        time.sleep(0.05)


def a_board() -> ProgressBoard:
    return ProgressBoard(a_plan(2).bundles)


def do_half(board: ProgressBoard) -> None:
    board.update("plan/bundle-00000.parquet", BundleCounts(requests=10))


@pytest.fixture
def flow_run_log() -> Iterator[list[logging.LogRecord]]:
    """What flow runs log; taken at their logger, once Prefect has set it up, as the first flow run would do."""
    from prefect.logging.configuration import setup_logging

    setup_logging()
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("prefect.flow_runs")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def test_progress_goes_on_after_the_api_was_away_and_warns_once(
    api: UnreliableApi, flow_run_log: list[logging.LogRecord]
) -> None:
    from prefect import flow

    board = a_board()

    @flow
    def job() -> str:
        with LiveProgress(board, "unreliable-progress", refresh_seconds=0.05):
            assert shown("unreliable-progress") == 0
            api.broken = True
            wait_for(lambda: len(api.refused) >= 3)
            api.broken = False
            do_half(board)
            wait_for(lambda: shown("unreliable-progress") == 50)
        return "done"

    assert job() == "done"
    warnings = [record for record in flow_run_log if record.getMessage().startswith("progress is not shown")]
    assert len(warnings) == 1


def test_the_log_of_the_flow_tells_how_far_the_engines_are(
    prefect_server: None, flow_run_log: list[logging.LogRecord]
) -> None:
    from prefect import flow

    board = a_board()
    do_half(board)

    @flow
    def job() -> str:
        with LiveProgress(board, "logged-progress", refresh_seconds=0.05, log_seconds=0.0):
            wait_for(lambda: any(" of " in record.getMessage() for record in flow_run_log))
        return "done"

    assert job() == "done"
    lines = [record.getMessage() for record in flow_run_log if "tokens/s" in record.getMessage()]
    assert lines[0].startswith("10 of 20 requests")


def test_an_api_that_is_away_from_begin_to_end_fails_nothing(api: UnreliableApi) -> None:
    from prefect import flow

    @flow
    def job() -> str:
        api.broken = True
        with LiveProgress(a_board(), "never-shown", refresh_seconds=0.05):
            wait_for(lambda: len(api.refused) >= 3)
        api.broken = False
        return "done"

    assert job() == "done"


def test_an_artifact_that_could_not_be_created_at_first_belongs_to_the_flow_run(api: UnreliableApi) -> None:
    from prefect import flow
    from prefect.artifacts import Artifact
    from prefect.runtime import flow_run

    @flow
    def job() -> str:
        api.broken = True
        with LiveProgress(a_board(), "late-progress", refresh_seconds=0.05):
            api.broken = False
            wait_for(lambda: shown("late-progress") is not None)
        return str(flow_run.id)

    run = job()
    found = Artifact.get("late-progress")
    assert found is not None
    assert str(found.flow_run_id) == run
