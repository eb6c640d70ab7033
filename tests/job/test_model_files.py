"""A model whose files were replaced is another model, and its job another job."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchllm_flows.job import BatchJob
from batchllm_operators.models.model_files import SMALL_FILE_BYTES, model_versions, pinned
from batchllm_operators.specs.execution import ModelSpec


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "chat_templates").mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "merges.txt"):
        (folder / name).write_text("{}")
    (folder / "chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_bytes(bytes(SMALL_FILE_BYTES + 1))
    return folder


def job_id(model: Path, **engine_args: Any) -> str:
    job = BatchJob.model_validate(
        {
            "source": {"uri": "in", "format": "parquet"},
            "prompt": {"kind": "template", "template": "{{ text }}"},
            "model": {"id": str(model), "engine_args": engine_args},
            "sink": {"uri": "out"},
        }
    )
    return job.job_id([])


def rewrite(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("{ }")


def same_size(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\1" * (SMALL_FILE_BYTES + 1))
    os.utime(folder / "model.safetensors", (2, 2))


CHANGES: dict[str, Callable[[Path], object]] = {
    "weights of the same size": same_size,
    "weights of another size": lambda folder: (folder / "model.safetensors").write_bytes(bytes(SMALL_FILE_BYTES + 2)),
    "chat template": rewrite("chat_template.jinja"),
    "chat template in a folder": rewrite("chat_templates/tool_use.jinja"),
    "generation settings": rewrite("generation_config.json"),
    "configuration": rewrite("config.json"),
    "tokenizer": rewrite("tokenizer.json"),
    "a file more": rewrite("adapter_config.json"),
    "a file less": lambda folder: (folder / "merges.txt").unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_job_on_a_changed_model_folder_is_another_job(model: Path, change: Callable[[Path], object]) -> None:
    before = job_id(model)
    assert job_id(model) == before
    change(model)
    assert job_id(model) != before


def test_what_does_not_decide_answers_does_not_count(model: Path) -> None:
    before = job_id(model)
    (model / "README.md").write_text("a model")
    (model / ".cache").mkdir()
    (model / ".cache" / "lock").write_text("x")
    os.utime(model / "chat_template.jinja", (1, 1))
    assert job_id(model) == before


def test_a_copy_that_keeps_times_is_the_same_model_and_one_that_does_not_is_another(model: Path) -> None:
    before = model_versions(ModelSpec(id=str(model)))
    for keep, name in ((shutil.copy2, "kept"), (shutil.copy, "new")):
        copy = model.parent / name
        shutil.copytree(model, copy, copy_function=keep)
        os.utime(copy / "merges.txt")
        assert (model_versions(ModelSpec(id=str(copy))) == before) == (name == "kept")


def test_the_folder_of_a_draft_model_counts(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    draft = {"speculative_config": {"model": str(folder)}}
    before = job_id(model, **draft)
    rewrite("config.json")(folder)
    assert job_id(model, **draft) != before


def test_a_hub_id_is_the_commit_that_the_cache_has_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    spec = ModelSpec(id="owner/model")
    assert model_versions(spec) == {}
    assert pinned(spec) == spec
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        (repository / "refs" / "main").write_text(commit)
        assert model_versions(spec) == {"model": commit}
        assert pinned(spec).revision == commit
    assert model_versions(ModelSpec(id="owner/model", revision="a" * 40)) == {"model": "a" * 40}


def test_a_branch_of_the_hub_is_where_it_stands_now_and_not_where_it_was_fetched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stands_at = "a" * 40

    def download(name: str, file: str, *, revision: str | None) -> str:
        assert (name, revision) == ("owner/model", "main")
        return f"/cache/models--owner--model/snapshots/{stands_at}/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    spec = ModelSpec(id="owner/model", revision="main")
    with caplog.at_level("INFO"):
        model_versions(spec)
    assert caplog.messages == ["fetching the configuration of owner/model"]
    assert (model_versions(spec), pinned(spec).revision) == ({"model": stands_at}, stands_at)
    stands_at = "b" * 40
    assert (model_versions(spec), pinned(spec).revision) == ({"model": stands_at}, stands_at)


def test_a_folder_is_no_hub_id(model: Path) -> None:
    assert pinned(ModelSpec(id=str(model))) == ModelSpec(id=str(model))


def test_a_branch_of_the_hub_is_looked_up_once_for_the_id_and_for_what_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str | None] = []

    def download(name: str, file: str, *, revision: str | None) -> str:
        asked.append(revision)
        return f"/cache/snapshots/{'a' * 40}/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    job = BatchJob.model_validate(
        {
            "source": {"uri": "in", "format": "parquet"},
            "prompt": {"kind": "template", "template": "{{ text }}"},
            "model": {"id": "owner/model"},
            "sink": {"uri": "out"},
        }
    )
    alone = job.job_id([])
    asked.clear()
    assert job.job_id([], pinned(job.model)) == alone
    assert asked == [None, "a" * 40], "a commit is found in the cache"
