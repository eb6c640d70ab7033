"""A store that fails at a tenth of the requests, and whose listings lag: jobs do not notice."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchllm_flows import BatchJob
from batchllm_flows.flows import batch_inference
from batchllm_flows.report_text import report_markdown
from batchllm_operators.errors import TerminalError, TransientError
from batchllm_operators.execute.backends.inline import Script
from batchllm_operators.execute.engine import Request
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.storage_retries import storage_retries
from batchllm_operators.store import Store
from benchmarks.fault_proxy import KINDS, FaultProxy
from tests.conftest import InlineEngines
from tests.flows.jobs import job_values, questions, read_output, write_input

SERVERS = ["rclone", "moto"]


@pytest.fixture
def proxied(place: tuple[str, StorageOptions]) -> Iterator[Any]:
    """Opens a folder of a real store behind a proxy."""
    uri, options = place
    backend = options.endpoint_url or os.environ["AWS_ENDPOINT_URL"]
    open_proxies: list[FaultProxy] = []

    def through(**faults: Any) -> tuple[FaultProxy, Store]:
        proxy = FaultProxy(backend, seed=7, **faults).__enter__()
        open_proxies.append(proxy)
        return proxy, Store(uri, StorageOptions(endpoint_url=proxy.url))

    yield through
    for proxy in open_proxies:
        proxy.__exit__(None, None, None)


@pytest.mark.parametrize("place", SERVERS, indirect=True)
def test_objects_are_written_and_read_whole_whatever_the_store_does(proxied: Any) -> None:
    proxy, store = proxied(rate=0.2)
    before = storage_retries()
    content = {f"object-{n}": bytes([n]) * (n * 997 + 1) for n in range(60)}
    for name, value in content.items():
        store.write_bytes(name, value)
    assert {name: store.read_bytes(name) for name in store.names()} == content
    assert all((found := store.object(name)) is not None and found.size == len(content[name]) for name in content)
    assert set(proxy.faults) == set(KINDS)
    assert storage_retries() > before


@pytest.mark.parametrize("place", SERVERS, indirect=True)
def test_a_store_that_answers_nothing_but_errors_is_a_transient_error_and_a_missing_object_is_told_at_once(
    proxied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = proxied(rate=0.0)
    whole.write_bytes("there", b"x")
    before = storage_retries()
    assert whole.content("not there") is None
    assert storage_retries() == before
    monkeypatch.setattr("batchllm_operators.storage_retries.ATTEMPTS", 2)
    _, broken = proxied(rate=1.0)
    with pytest.raises(TransientError):
        for _ in range(20):  # a late or a halved answer is one of six faults
            broken.read_bytes("there")


@pytest.mark.usefixtures("prefect_server")
def test_a_job_on_a_store_that_fails_has_the_output_of_an_undisturbed_one(
    bucket: str, tiny_llama: str, inline_engines: InlineEngines, tmp_path: Path
) -> None:
    inline_engines.script = Script(answer=lambda request: str(request.prompt_token_ids[-9:]))
    write_input(f"{bucket}/in", questions(60), files=4)
    execution = {"backend": "inline", "calibrate": False, "part_rows": 3, "reuse": "none"}
    undisturbed = job_values(f"{bucket}/in", str(tmp_path / "out"), tiny_llama, execution=execution)
    expected = read_output(batch_inference(BatchJob.model_validate(undisturbed)).output_uri)
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"], rate=0.1, seed=3, lag_seconds=5.0) as proxy:
        storage = {"endpoint_url": proxy.url}
        values = job_values(f"{bucket}/in", f"{bucket}/out", tiny_llama, execution=execution)
        values["source"] |= {"storage": storage}
        values["sink"] |= {"storage": storage}
        report = batch_inference(BatchJob.model_validate(values))
    assert proxy.faults.total() > 20
    assert proxy.faults["stale_listing"] > 0
    assert report.computed_requests == 59, "nothing is computed twice"
    assert f"{report.storage_retries} requests to object stores were sent again" in report_markdown(report)
    assert read_output(f"{bucket}/out") == expected


@pytest.mark.usefixtures("prefect_server")
def test_credentials_that_expire_end_the_run_which_goes_on_when_they_are_renewed(
    bucket: str, tiny_llama: str, inline_engines: InlineEngines
) -> None:
    write_input(f"{bucket}/in", questions(40))
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"], rate=0.0, seed=1) as proxy:
        storage = {"endpoint_url": proxy.url}
        execution = {"backend": "inline", "calibrate": False, "part_rows": 3, "retries": 0}
        values = job_values(f"{bucket}/in", f"{bucket}/out", tiny_llama, execution=execution)
        values["source"] |= {"storage": storage}
        values["sink"] |= {"storage": storage}
        answered: list[bytes] = []

        def answer(request: Request) -> str:
            answered.append(request.key)
            if len(answered) == 20:
                proxy.expired = True
            return "an answer"

        inline_engines.script = Script(answer=answer)
        with pytest.raises(TerminalError, match=r"credentials for endpoint .* have expired: renew them and run again"):
            batch_inference(BatchJob.model_validate(values))
        proxy.expired = False
        report = batch_inference(BatchJob.model_validate(values))
    assert 0 < report.computed_requests < 39, "what was written before is not computed again"
    assert len(read_output(f"{bucket}/out")) == 40


def test_credentials_of_a_process_are_renewed_before_they_expire(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    keys = {"AccessKeyId": os.environ["AWS_ACCESS_KEY_ID"], "SecretAccessKey": os.environ["AWS_SECRET_ACCESS_KEY"]}
    process = tmp_path / "process.py"
    process.write_text(
        "import datetime, json\n"
        f"open({str(calls)!r}, 'a').write('x')\n"
        "end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=2)\n"
        f"print(json.dumps({{'Version': 1, **{keys!r}, 'Expiration': end.isoformat()}}))\n"
    )
    config = tmp_path / "config"
    config.write_text(f"[profile renewing]\ncredential_process = {sys.executable} {process}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store = Store(f"{bucket}/folder", StorageOptions(profile="renewing"))
    store.write_bytes("first", b"x")
    after_one = len(calls.read_text())
    store.write_bytes("second", b"x")
    assert len(calls.read_text()) > after_one >= 1, "so close to their end they are asked for anew"
