"""`sampling.defaults: model`: what the authors of a model recommend stands where the job sets nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from batchllm_flows.job import BatchJob
from batchllm_operators.errors import TerminalError
from batchllm_operators.models.generation_defaults import with_model_defaults
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.sampling import SamplingSpec

RECOMMENDED = {
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "max_new_tokens": 77,
    "do_sample": True,
    "eos_token_id": 2,
}


@pytest.fixture
def recommending(tmp_path: Path) -> ModelSpec:
    (tmp_path / "generation_config.json").write_text(json.dumps(RECOMMENDED))
    return ModelSpec(id=str(tmp_path))


def filled(model: ModelSpec, **given: Any) -> dict[str, Any]:
    found = with_model_defaults(SamplingSpec.model_validate({"defaults": "model", **given}), model)
    assert found.defaults == "batchllm"
    return found.model_dump(exclude_defaults=True)


def test_what_the_job_does_not_set_is_the_models(recommending: ModelSpec) -> None:
    assert filled(recommending) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_tokens": 77}
    given = {"temperature": 0.0, "max_tokens": 9, "override_column": "s"}
    assert filled(recommending, **given) == {"top_k": 20, "top_p": 0.95, "max_tokens": 9, "override_column": "s"}


def test_without_it_the_model_has_no_say(recommending: ModelSpec) -> None:
    assert with_model_defaults(SamplingSpec(), recommending) == SamplingSpec()


def test_arguments_of_the_engine_count_as_in_vllm(recommending: ModelSpec, tmp_path: Path) -> None:
    overriding = recommending.model_copy(update={"engine_args": {"override_generation_config": {"top_p": 0.5}}})
    assert filled(overriding)["top_p"] == 0.5
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text(json.dumps({"temperature": 0.1}))
    elsewhere = recommending.model_copy(update={"engine_args": {"generation_config": str(other)}})
    assert filled(elsewhere) == {"temperature": 0.1}


def test_they_are_those_that_vllm_takes(recommending: ModelSpec, tiny_llama: str, tmp_path: Path, vllm: Any) -> None:
    del vllm
    from vllm.config import ModelConfig

    for file in Path(tiny_llama).iterdir():
        if file.name != "generation_config.json":
            shutil.copy(file, tmp_path)
    theirs = ModelConfig(model=str(tmp_path), dtype="float32").get_diff_sampling_param()
    assert filled(recommending) == theirs


def test_a_model_without_recommendation_or_with_a_wrong_one_is_told(recommending: ModelSpec, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 7.0, "do_sample": True}))
    with pytest.raises(TerminalError, match=r"has temperature 7\.0: .* set sampling\.temperature in the job"):
        filled(recommending)
    for broken in ("[1]", "{", "7"):
        (tmp_path / "generation_config.json").write_text(broken)
        with pytest.raises(TerminalError, match=r"sampling\.defaults: expected generation_config\.json"):
            filled(recommending)
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(TerminalError, match=r"sampling\.defaults: expected generation_config\.json of the model"):
        filled(recommending)


def test_the_job_counts_with_what_stands_in_it_in_the_end(recommending: ModelSpec) -> None:
    values = {
        "source": {"uri": "in", "format": "jsonl"},
        "prompt": {"kind": "column", "column": "x"},
        "sink": {"uri": "out"},
    }
    said = {**values, "model": {"id": recommending.id}}
    left_to_model = BatchJob.model_validate({**said, "sampling": {"defaults": "model"}}).with_model_defaults()
    spelt_out = BatchJob.model_validate(
        {**said, "sampling": {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_tokens": 77}}
    )
    assert left_to_model.job_id([]) == spelt_out.job_id([])
