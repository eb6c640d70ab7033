"""A Prefect server that is gone while a job runs: the job goes on, and its end is told when the server is back."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings

from batchllm_flows import prefect_server
from batchllm_flows.flows import batch_inference
from batchllm_operators.errors import BatchLLMError
from batchllm_operators.execute.backends.inline import Script
from batchllm_operators.execute.engine import Request
from tests.conftest import InlineEngines
from tests.flows.jobs import job, questions, write_input


class Gate:
    """A port in front of a server; while it is shut, connections are refused and those that are open end."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._backend = (parts.hostname, parts.port)
        self._open_ones: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self._port = 0
        self.open()
        self.url = f"http://127.0.0.1:{self._port}{parts.path}"

    def open(self) -> None:
        listener = socket.create_server(("127.0.0.1", self._port), reuse_port=False)
        self._listener, self._port = listener, listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        assert self._listener is not None
        # Without this the thread that accepts keeps the port open.
        for one in (self._listener, *self._open_ones):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open_ones.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(self._backend)
            except OSError:
                return
            self._open_ones += [client, server]
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self._copy, args=ends, daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError), closing(to):
            while data := source.recv(65536):
                to.sendall(data)


@pytest.fixture
def gate(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    del prefect_server
    url = get_current_settings().api.url
    assert url is not None
    found = Gate(url)
    # By default it tries each call for a minute, artifacts included; once more is for the connections that have ended.
    with temporary_settings({PREFECT_API_URL: found.url, PREFECT_CLIENT_MAX_RETRIES: 1}):
        yield found
    # It stays open: Prefect sends what it has to tell, such as logs, until the session ends.


class OpensWhenWaitedFor(logging.Handler):
    """Lets the server come back when the run says that it waits for it."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "is waited for" in record.getMessage():
            self.told.append(record.getMessage())
            self._gate.open()


@pytest.mark.parametrize("fails", [False, True])
def test_the_job_goes_on_and_its_end_is_told_when_the_server_is_back(
    gate: Gate,
    tiny_llama: str,
    inline_engines: InlineEngines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: bool,
) -> None:
    monkeypatch.setattr(prefect_server, "POLL_SECONDS", 0.05)
    answered: list[Request] = []

    def answer(request: Request) -> str:
        answered.append(request)
        if len(answered) == 5:
            gate.shut()
        return "an answer"

    inline_engines.script = Script(answer=answer)
    write_input(str(tmp_path / "in"), questions(12))
    if fails:  # at the merge, long after the server has gone
        monkeypatch.setattr("batchllm_flows.flows._merge", _refused)
    handler = OpensWhenWaitedFor(gate)
    logging.getLogger("prefect.flow_runs").addHandler(handler)
    try:
        state = batch_inference(
            job(str(tmp_path / "in"), str(tmp_path / "out"), tiny_llama, execution__backend="inline"),
            return_state=True,
        )
    finally:
        logging.getLogger("prefect.flow_runs").removeHandler(handler)
    assert len(handler.told) == 1
    assert len(answered) == 11
    assert (tmp_path / "out/_manifest.json").exists() is not fails
    assert state.state_details.flow_run_id is not None
    with get_client(sync_client=True) as client:
        known = client.read_flow_run(state.state_details.flow_run_id).state
    assert known is not None
    assert known.is_failed() if fails else known.is_completed()


def _refused(*_arguments: object) -> None:
    raise BatchLLMError("no output this time")
