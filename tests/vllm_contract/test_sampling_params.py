"""The sampling fields of a job are those of the installed vLLM, or are left out for a reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest

from batchllm_operators.specs.sampling import RepetitionDetection, SamplingParameters
from batchllm_operators.specs.structured_outputs import StructuredOutputs
from batchllm_operators.tasks.base import TaskRequest
from batchllm_operators.tasks.generate import GENERATION

pytestmark = pytest.mark.usefixtures("vllm")

LEFT_OUT = {
    "n": "an answer is one completion",
    "logprobs": "answers have no column for them",
    "prompt_logprobs": "as above",
    "prompt_logprob_token_ids": "as above",
    "prompt_logprob_start": "as above",
    "logprob_token_ids": "as above",
    "flat_logprobs": "as above",
    "routed_experts_prompt_start": "as above",
    "watermarking": "it needs a watermark of the engine",
    "detokenize": "the text is the answer",
    "output_kind": "only whole answers are of use",
    "stream_interval": "as above",
    "skip_clone": "internal",
    "output_text_buffer_length": "internal",
    "extra_args": "ours, for the plan",
    "skip_reading_prefix_cache": "it would compute shared prefixes again",
    "trace_decode_token_ids": "for debugging",
}
OTHER_DEFAULTS = {"temperature", "max_tokens"}
"""Greedy, and longer than vLLM's 16 tokens."""
OTHER_NAMES = {"json_schema": "json"}
VALUES: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "presence_penalty": 0.5,
    "frequency_penalty": -0.5, "repetition_penalty": 1.2, "max_tokens": 9, "min_tokens": 2, "stop": ["END"],
    "stop_token_ids": [5], "include_stop_str_in_output": True, "ignore_eos": True, "skip_special_tokens": False,
    "spaces_between_special_tokens": False, "bad_words": ["no"], "allowed_token_ids": [1, 2], "logit_bias": {3: 1.5},
    "thinking_token_budget": 4, "structured_outputs": {"choice": ["yes", "no"]},
    "repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 2, "min_count": 3},
}  # fmt: skip


def fields_of_vllm() -> dict[str, Any]:
    from vllm import SamplingParams

    fields = msgspec.structs.fields(SamplingParams)
    return {field.name: field.default for field in fields if not field.name.startswith("_")}


def test_every_field_of_vllm_is_ours_or_left_out_for_a_reason() -> None:
    assert set(fields_of_vllm()) == SamplingParameters.model_fields.keys() | LEFT_OUT.keys()
    assert SamplingParameters.model_fields.keys() == VALUES.keys()


def test_defaults_are_those_of_vllm() -> None:
    theirs = fields_of_vllm()
    for name, field in SamplingParameters.model_fields.items():
        if name not in OTHER_DEFAULTS:
            assert (field.default or None) == (theirs[name] or None), name


def test_every_value_reaches_vllm() -> None:
    made = GENERATION.to_vllm(TaskRequest(SamplingParameters.model_validate(VALUES), None))
    for name, value in VALUES.items():
        found = getattr(made, name)
        if name == "repetition_detection":
            found = {field: getattr(found, field) for field in RepetitionDetection.model_fields}
        if name == "structured_outputs":
            found = {"choice": found.choice}
        assert found == value, name


def test_every_kind_of_structured_output_is_that_of_vllm() -> None:
    from vllm.sampling_params import StructuredOutputsParams

    theirs = {field.name for field in dataclasses.fields(StructuredOutputsParams) if field.init}
    # Of a request vLLM passes over these without a word: only those of the engine count.
    theirs -= {"disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"}
    assert theirs == {OTHER_NAMES.get(name, name) for name in StructuredOutputs.model_fields}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for fields in ({"json_schema": schema}, {"json_object": True}, {"regex": "a+"}):
        wanted = StructuredOutputs.model_validate(fields)
        made = StructuredOutputsParams(**wanted.to_vllm())
        for name, value in fields.items():
            assert getattr(made, OTHER_NAMES.get(name, name)) == value


@pytest.mark.parametrize(
    "change",
    [
        *({"temperature": value} for value in (-0.1, 2.1)),
        *({"top_p": value} for value in (0, 1.1)),
        {"top_k": -2},
        *({"min_p": value} for value in (-0.1, 1.1)),
        *({name: value} for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1)),
        {"repetition_penalty": 0},
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": 10, "max_tokens": 9},
        {"stop": [""]},
        {"bad_words": [""]},
        {"repetition_detection": {"max_pattern_size": 2, "min_count": 1}},
        {"repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}},
    ],
    ids=str,
)
def test_what_vllm_refuses_is_refused_in_the_job(change: dict[str, Any]) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RepetitionDetectionParams

    with pytest.raises(ValueError, match=next(iter(change))):
        SamplingParameters.model_validate(change)
    with pytest.raises(VLLMClientError):
        if "repetition_detection" in change:
            RepetitionDetectionParams(**change["repetition_detection"])
        SamplingParams(**change)
