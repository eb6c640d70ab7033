"""Values that look like others, and secrets: each is refused with the field's whole name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from batchllm_flows import BatchJob
from batchllm_flows.job import InvalidJobError
from batchllm_operators.errors import TerminalError


def values(**changes: Any) -> dict[str, Any]:
    job: dict[str, Any] = {
        "source": {"uri": "in", "format": "jsonl"},
        "prompt": {"kind": "column", "column": "text"},
        "model": {"id": "m"},
        "sink": {"uri": "out"},
    }
    for dotted, value in changes.items():
        part, _, field = dotted.partition("__")
        job.setdefault(part, {})[field] = value
    return job


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"execution__keep_days": "inf"}, "execution.keep_days: Input should be a finite number"),
        ({"execution__stall_timeout_s": "nan"}, "execution.stall_timeout_s: Input should be a finite number"),
        ({"sampling__max_tokens": True}, "sampling: max_tokens: expected a number, got true"),
        ({"source__limit": True}, "source: limit: expected a number, got true"),
        ({"execution__keep_days": False}, "execution: keep_days: expected a number, got false"),
        (
            {"execution__reuse": False},
            "execution.reuse: expected sink, same_job_name, none or a URI, got false: to",
        ),
    ],
)
def test_values_that_look_like_others_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "job.json").write_bytes(orjson.dumps(values(**changes)))
    with pytest.raises(InvalidJobError) as told:
        BatchJob.from_file(tmp_path / "job.json")
    assert message in str(told.value)


SECRETS = [
    "https://key:secret-word@host/bucket",
    "https://bucket.host/rows?X-Amz-Algorithm=A&X-Amz-Signature=secret-word",
    "https://host/bucket?sv=1&sig=secret-word",
    "https://host/rows?token=secret-word&x=1",
    "https://host/rows?api_key=secret-word",
    "https://host/rows#id_token=secret-word",
    "https://host/rows?x=1&%74oken=secret-word",
    "https://host/rows?password=secret-word",
]


@pytest.mark.parametrize("url", SECRETS)
@pytest.mark.parametrize("field", ["source__uri", "sink__uri", "execution__reuse", "execution__work_uri", "model__id"])
def test_a_url_that_lets_in_whoever_has_it_is_refused_unseen_and_its_field_is_named(
    tmp_path: Path, field: str, url: str
) -> None:
    (tmp_path / "job.json").write_bytes(orjson.dumps(values(**{field: url})))
    with pytest.raises(InvalidJobError) as told:
        BatchJob.from_file(tmp_path / "job.json")
    assert f"{field.replace('__', '.')}: expected a URL without user, password or signature" in str(told.value)
    assert "secret-word" not in str(told.value)
    for number, storage in enumerate(("source", "sink")):
        place = values()
        place[storage]["storage"] = {"endpoint_url": url}
        (tmp_path / f"{number}.json").write_bytes(orjson.dumps(place))
        with pytest.raises(InvalidJobError, match=rf"{storage}\.storage\.endpoint_url: expected a URL without user"):
            BatchJob.from_file(tmp_path / f"{number}.json")


def test_text_about_urls_is_no_secret() -> None:
    job = values(prompt__kind="template")
    job["prompt"] = {"kind": "template", "template": "What is https://host/?token=1 in {{ text }}?"}
    assert BatchJob.model_validate(job)


@pytest.mark.parametrize(("place", "message"), [("ftp://host/answers", "execution.reuse: "), ("FILE", "got an object")])
def test_a_place_that_can_hold_no_answers_is_named(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    job = BatchJob.model_validate(values(execution__reuse=place.replace("FILE", str(tmp_path / "file"))))
    with pytest.raises(TerminalError) as told:
        job.answers_store()
    assert str(told.value).startswith("execution.reuse: ")
    assert message in str(told.value)


CODE = [
    {"trust_remote_code": True},
    {"worker_cls": "evil.Worker"},
    {"scheduler_cls": "evil.Scheduler"},
    {"worker_extension_cls": "evil.Extension"},
    {"logits_processors": ["evil.Processor"]},
    {"tool_parser_plugin": "evil.py"},
    {"kv_transfer_config": {"kv_connector_module_path": "evil"}},
    {"io_processor_plugin": "evil"},
    {"distributed_executor_backend": "evil.Executor"},
]


@pytest.mark.parametrize("arguments", CODE)
def test_code_runs_only_where_the_job_allows_it(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"model\.engine_args\.{name}.* names code that the engines would run"):
        BatchJob.model_validate(values(model__engine_args=arguments, model__id="m"))
    allowed = BatchJob.model_validate(values(model__engine_args=arguments, model__allow_code=True, model__id="m"))
    assert allowed.model.engine_args == arguments


def test_a_permission_that_is_not_given_changes_no_id() -> None:
    job = BatchJob.model_validate(values(model__engine_args={"trust_remote_code": False}, model__id="m"))
    assert "allow_code" not in job.model_dump(mode="json")["model"]
    assert BatchJob.model_validate(job.model_dump(mode="json")) == job
