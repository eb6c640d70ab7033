"""Secrets of every kind that a run knows: none stands in what it writes, logs, or tells Prefect."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from batchllm_flows import BatchJob
from batchllm_flows.flows import batch_inference, plan_batch_inference
from batchllm_operators.errors import BatchLLMError
from batchllm_operators.execute.backends.inline import Script
from batchllm_operators.store import Store
from benchmarks.fault_jobs import prefect_database
from tests.conftest import InlineEngines
from tests.flows.jobs import job_values, questions, write_input

CANARY = "canary-1b2c3d4e5f"


@pytest.mark.usefixtures("prefect_server")
def test_no_secret_stands_anywhere(
    bucket: str,
    tiny_llama: str,
    inline_engines: InlineEngines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    inline_engines.script = Script(answer=lambda _request: "an answer")
    write_input(f"{bucket}/in", questions(8))
    monkeypatch.setenv("HF_TOKEN", f"{CANARY}-hub")
    monkeypatch.setenv("AWS_SECRET_NOTES", f"{CANARY}-environment")
    profiles = tmp_path / "credentials"
    profiles.write_text(f"[canary]\naws_access_key_id = {CANARY}-id\naws_secret_access_key = {CANARY}-key\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profiles))
    execution = {"backend": "inline", "calibrate": False}
    values = job_values(f"{bucket}/in", f"{bucket}/out", tiny_llama, execution=execution)
    told = [str(batch_inference(BatchJob.model_validate(values)))]
    told.append(str(plan_batch_inference(BatchJob.model_validate(values | {"name": "planned"}))))

    endpoint = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    refused = values | {"source": values["source"] | {"storage": {"profile": "canary"}}}
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        with pytest.raises(BatchLLMError) as caught:
            batch_inference(BatchJob.model_validate(refused))
        told.append(str(caught.value))
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://user:{CANARY}-url@127.0.0.1:9")
        patch.setattr("batchllm_operators.storage_retries.ATTEMPTS", 1)
        with pytest.raises(BatchLLMError) as caught:
            batch_inference(BatchJob.model_validate(values))
        told.append(str(caught.value))
    user_info = {"storage": {"endpoint_url": f"http://user:{CANARY}-field@{endpoint.netloc}"}}
    with pytest.raises(BatchLLMError) as caught:
        BatchJob.model_validate(values | {"sink": values["sink"] | user_info})
    told.append(str(caught.value))

    output = Store(f"{bucket}/out")
    written = [output.read_bytes(name) for name in output.names()]
    assert any(b"questions" in content for content in written), "the search finds what is there"
    database = prefect_database()
    assert database
    assert any(b"questions" in content for content in database)
    places = {
        "objects": written,
        "Prefect's database": database,
        "logs": [caplog.text.encode()],
        "output": [stream.encode() for stream in capfd.readouterr()],
        "errors": [text.encode() for text in told],
    }
    found = {place: sum(content.count(CANARY.encode()) for content in contents) for place, contents in places.items()}
    assert found == dict.fromkeys(places, 0)
