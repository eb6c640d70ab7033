import json
from pathlib import Path
from typing import Any

import pytest

from batchllm_flows.job import BatchJob, InvalidJobError
from batchllm_flows.job_yaml import RepeatedKeyError, load_yaml
from batchllm_operators.errors import TerminalError, TransientError
from batchllm_operators.records import InputObject


def values(**changes: Any) -> dict[str, Any]:
    return {
        "source": {"uri": "in", "format": "parquet"},
        "prompt": {"kind": "chat", "user": "{{ text }}"},
        "model": {"id": "model"},
        "sink": {"uri": "out"},
    } | changes


def write(folder: Path, content: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(content)
    return path


def test_a_job_is_loaded_from_json_and_survives_the_round_trip(tmp_path: Path) -> None:
    job = BatchJob.from_file(write(tmp_path, json.dumps(values())))
    assert BatchJob.model_validate_json(job.model_dump_json()) == job


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"source": {"uri": "in", "fromat": "parquet"}}, "source: unknown key 'fromat'; did you mean 'format'?"),
        ({"smapling": {}}, "unknown key 'smapling'; did you mean 'sampling'?"),
        ({"prompt": {"kind": "chat", "user": "x", "zzz": 1}}, "unknown key 'zzz'; valid keys: kind, system, user"),
        ({"prompt": {"kind": "chatt", "user": "x"}}, "'chat'"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature: Input should be greater than or equal to 0 (got"),
        ({"sampling": {"stop": ["a", ""]}}, "expected non-empty texts"),
        ({"execution": {"engines": 0}}, "execution.engines"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidJobError) as caught:
        BatchJob.from_file(write(tmp_path, json.dumps(values(**changes))))
    assert expected in str(caught.value)


def test_a_missing_file_and_a_file_that_is_not_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidJobError, match=r"No such file.*nowhere\.yaml"):
        BatchJob.from_file(tmp_path / "nowhere.yaml")
    with pytest.raises(InvalidJobError, match="not YAML"):
        BatchJob.from_file(write(tmp_path, "a: ["))
    with pytest.raises(InvalidJobError, match="expected a mapping, got list"):
        BatchJob.from_file(write(tmp_path, "[]"))


@pytest.mark.parametrize("indent", ["", "  "])
def test_a_key_that_stands_twice_is_named_with_both_lines(tmp_path: Path, indent: str) -> None:
    text = f"name: one\nmodel:\n  id: m\n{indent}{'id: n' if indent else 'name: two'}\n"
    key, first = ("id", 3) if indent else ("name", 1)
    with pytest.raises(
        InvalidJobError, match=f"expected each key once, got '{key}' in line {first} and again in line 4"
    ):
        BatchJob.from_file(write(tmp_path, text))


def test_a_template_without_quotes_is_no_yaml_and_is_told_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(InvalidJobError, match=r"not YAML or JSON(.|\n)*unhashable key(.|\n)*line 1, column 8"):
        BatchJob.from_file(write(tmp_path, "name: {{ name }}\n"))


def test_anchors_and_merged_keys_are_no_repetitions() -> None:
    text = "base: &base {<<: {x: 1}, x: 2}\none: {<<: *base, y: 3}\ntwo: [*base, *base]\n"
    assert load_yaml(text)["two"] == [{"x": 2}, {"x": 2}]
    assert load_yaml("") is None
    with pytest.raises(RepeatedKeyError, match="got 'x' in line 2 and again in line 3"):
        load_yaml("one: &one\n  x: 1\n  x: 2\ntwo: *one\n")


def test_settings_replace_values_by_dotted_path(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(values()))
    job = BatchJob.from_file(path, {"sampling.max_tokens": 7, "model.engine_args.enforce_eager": True})
    assert job.sampling.max_tokens == 7
    assert job.model.engine_args == {"enforce_eager": True}
    with pytest.raises(InvalidJobError, match="id is not a section"):
        BatchJob.from_file(path, {"model.id.deeper": 1})


def test_the_id_follows_what_decides_the_answers_and_nothing_else() -> None:
    objects = [InputObject(path="a", size=1, version="v")]
    base = BatchJob.model_validate(values())
    same = BatchJob.model_validate(values(sink={"uri": "elsewhere"}, execution={"engines": 4}, name="other"))
    warmer = BatchJob.model_validate(values(sampling={"temperature": 1.0}))
    assert base.job_id(objects) == same.job_id(objects)
    assert base.job_id(objects) != warmer.job_id(objects)
    assert base.job_id(objects) != base.job_id([InputObject(path="a", size=1, version="w")])


@pytest.mark.parametrize(
    ("prompt", "change"),
    [
        ({"kind": "chat", "user": "{{ text }}"}, {"special_tokens": "allow"}),
        ({"kind": "messages", "column": "chat"}, {"special_tokens": "allow"}),
        ({"kind": "messages", "column": "chat"}, {"continue_final_message": True}),
    ],
)
def test_what_becomes_of_special_tokens_and_of_a_last_message_counts(
    prompt: dict[str, Any], change: dict[str, Any]
) -> None:
    objects = [InputObject(path="a", size=1, version="v")]
    one = BatchJob.model_validate(values(prompt=prompt))
    other = BatchJob.model_validate(values(prompt=prompt | change))
    assert one.job_id(objects) != other.job_id(objects)


def test_the_order_of_the_fields_counts_where_the_prompt_has_fields_and_no_other_planning_does() -> None:
    objects = [InputObject(path="a", size=1, version="v")]
    fields = {"kind": "fields", "question": "So?", "columns": ["a", "b"]}

    def identity(planning: dict[str, Any], **changes: Any) -> str:
        return BatchJob.model_validate(values(planning=planning, **changes)).job_id(objects)

    assert identity({}, prompt=fields) == identity({"field_order": "optimise", "block_size": 16}, prompt=fields)
    assert identity({}, prompt=fields) != identity({"field_order": "as_given"}, prompt=fields)
    assert identity({}) == identity({"field_order": "as_given"})


def test_the_schema_describes_every_section() -> None:
    schema = BatchJob.model_json_schema()
    assert set(schema["properties"]) == {
        "name", "task", "source", "prompt", "model", "sampling", "planning", "execution", "sink",
    }  # fmt: skip
    assert schema["additionalProperties"] is False


def test_errors_survive_pickling_with_where_they_happened() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(TransientError("lost", bundle="bundle-00001", uri="s3://b/x")))  # noqa: S301
    assert isinstance(error, TransientError)
    assert str(error) == "lost (bundle bundle-00001, uri s3://b/x)"
    assert not isinstance(error, TerminalError)


@pytest.mark.parametrize(
    ("dotted", "value", "field"),
    [
        ("sink.storage.endpoint_url", "http://admin:hunter2@minio:9000", "sink.storage.endpoint_url"),
        ("source.uri", "s3://admin:hunter2@bucket/in/", "source.uri"),
        ("execution.work_uri", "https://hunter2@store/work", "execution.work_uri"),
        ("execution.reuse", "s3://admin:hunter2@bucket/answers", "execution.reuse"),
        ("model.engine_args.hf_token", "hunter2", "model.engine_args.hf_token"),
        ("model.engine_args.api_key", "hunter2", "model.engine_args.api_key"),
        ("model.engine_args.hf_overrides.auth", "hunter2", "model.engine_args.hf_overrides.auth"),
        ("model.engine_args.download_dir", "s3://u:hunter2@b/x", "model.engine_args.download_dir"),
    ],
)
def test_a_secret_in_a_job_is_refused_without_showing_it(tmp_path: Path, dotted: str, value: str, field: str) -> None:
    with pytest.raises(InvalidJobError, match=f"invalid job: {field}: expected ") as caught:
        BatchJob.from_file(write(tmp_path, json.dumps(values())), {dotted: value})
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    path = write(tmp_path, json.dumps(values()))
    assert BatchJob.from_file(path, {"model.engine_args.hf_token": True}).model.engine_args == {"hf_token": True}
    at_sign = BatchJob.from_file(path, {"source.uri": "s3://bucket/by@day/", "prompt.user": "mail a@b"})
    assert at_sign.source.uri == "s3://bucket/by@day/"
