"""A loaded vLLM engine, in its process, computing bundles of a store."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.messages import AllRead, BundleCounts, BundleEvent, PartWritten, Progress
from batchllm_operators.specs.sampling import SamplingParameters
from batchllm_operators.specs.structured_outputs import StructuredOutputs
from tests.execute.engines import StartedEngine

pytestmark = pytest.mark.engine


def test_every_request_of_a_bundle_is_answered_in_parts_of_limited_rows(warm_engine: StartedEngine, work: Any) -> None:
    bundle = work.write_bundle(requests=20, max_tokens=6)
    events: list[BundleEvent] = []
    done = warm_engine.run(work.run_command(bundle, part_rows=7), events.append)
    assert [event.name for event in events if isinstance(event, PartWritten)] == list(done.parts)
    assert sorted(work.store.names("results")) == sorted(done.parts)
    assert [len(work.read((name,))) for name in done.parts] == [7, 7, 6]
    answers = work.answers(done.parts)
    assert list(answers) == list(range(20))
    for row in answers.values():
        assert row["error"] is None
        assert row["finish_reason"] == "length"
        assert row["completion_tokens"] == len(row["output_token_ids"]) == 6
        assert row["prompt_tokens"] == 69
        assert row["completion"]
    assert (done.counts.requests, done.counts.errors) == (20, 0)
    assert done.counts.prompt_tokens == bundle.prompt_tokens
    assert done.counts.completion_tokens == 120
    assert done.counts.cached_tokens == sum(row["cached_tokens"] for row in answers.values()) >= 12 * 64
    assert next(event.counts for event in events if isinstance(event, Progress)) == BundleCounts()
    assert sum(isinstance(event, AllRead) for event in events) == 1


def test_every_request_is_sampled_as_it_says(warm_engine: StartedEngine, work: Any) -> None:
    wanted: list[dict[str, Any]] = [
        {"allowed_token_ids": [7]},
        {"logit_bias": {"11": 100.0}},
        {"logit_bias": {"11": 100.0}, "stop_token_ids": [11]},
        {"logit_bias": {"11": 100.0}, "stop_token_ids": [11], "min_tokens": 3},
        {"ignore_eos": True, "repetition_penalty": 50.0},
        {"logit_bias": {"11": 100.0}, "repetition_detection": {"max_pattern_size": 1, "min_count": 4}},
        {"temperature": 1.5, "seed": 1, "top_k": 1},
        {},
    ]
    texts = {row: SamplingParameters.model_validate(fields).to_json() for row, fields in enumerate(wanted)}
    bundle = work.write_bundle(requests=len(wanted), max_tokens=6, sampling=texts)
    answers = work.answers(warm_engine.run(work.run_command(bundle)).parts)
    tokens = {row: answers[row]["output_token_ids"] for row in answers}
    assert tokens[0] == [7] * 6
    assert tokens[1] == [11] * 6
    assert (tokens[2], answers[2]["finish_reason"]) == ([11], "stop")
    assert (len(tokens[3]), answers[3]["finish_reason"]) == (4, "stop"), tokens[3]
    assert len(tokens[4]) == len(set(tokens[4])) == 6
    assert tokens[5] == [11] * 4
    greedy = work.write_bundle("greedy", requests=8, max_tokens=6)
    assert tokens[7] == work.answers(warm_engine.run(work.run_command(greedy)).parts)[7]["output_token_ids"]


def test_structured_outputs_are_all_as_they_must_be(warm_engine: StartedEngine, work: Any) -> None:
    marks = {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 1, "maxItems": 3}
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["bug", "wish"]}, "marks": marks},
        "required": ["kind", "marks"],
        "additionalProperties": False,
    }
    wanted = [
        {"json_schema": schema},
        {"choice": ["yes", "no", "perhaps not"]},
        {"regex": "[0-9]{3}-[a-f]{2}"},
        {"grammar": 'root ::= "x" ("y" | "z") "!"'},
    ]
    count = 100
    texts = {
        row: SamplingParameters(
            temperature=1.0, seed=row, structured_outputs=StructuredOutputs.model_validate(wanted[row % len(wanted)])
        ).to_json()
        for row in range(count)
    }
    bundle = work.write_bundle(requests=count, max_tokens=200, sampling=texts)
    answers = work.answers(warm_engine.run(work.run_command(bundle)).parts)
    assert len(answers) == count
    for row, answer in answers.items():
        assert answer["error"] is None
        assert answer["finish_reason"] == "stop", (row, answer["completion"][:100])
        text = answer["completion"]
        if row % len(wanted) == 0:
            Draft202012Validator(schema).validate(json.loads(text))
        else:
            assert re.fullmatch("yes|no|perhaps not|[0-9]{3}-[a-f]{2}|x[yz]!", text)


@pytest.mark.parametrize("wrong", [{"regex": "a(b"}, {"grammar": "root ::= nothing"}])
def test_a_constraint_that_vllm_does_not_take_is_the_error_of_its_row(
    warm_engine: StartedEngine, work: Any, wrong: dict[str, Any]
) -> None:
    text = SamplingParameters(structured_outputs=StructuredOutputs.model_validate(wrong)).to_json()
    answers = work.answers(warm_engine.run(work.run_command(work.write_bundle(requests=3, sampling={1: text}))).parts)
    assert [answers[row]["error"] is None for row in range(3)] == [True, False, True]
    assert answers[1]["error"]["code"] == "engine_error"


def test_a_bundle_on_s3_is_computed_to_parts_on_s3(warm_engine: StartedEngine, work_on_s3: Any) -> None:
    done = warm_engine.run(work_on_s3.run_command(work_on_s3.write_bundle()))
    assert len(work_on_s3.answers(done.parts)) == 12


def test_greedy_answers_do_not_depend_on_the_bundle_they_come_in(warm_engine: StartedEngine, work: Any) -> None:
    small, large = work.write_bundle("small", requests=3), work.write_bundle("large", requests=12)
    first = work.answers(warm_engine.run(work.run_command(small)).parts)
    second = work.answers(warm_engine.run(work.run_command(large)).parts)
    assert [first[number]["output_token_ids"] for number in range(3)] == [
        second[number]["output_token_ids"] for number in range(3)
    ]


def test_a_request_the_engine_refuses_is_a_row_error_and_the_others_are_answered(
    warm_engine: StartedEngine, work: Any
) -> None:
    bundle = work.write_bundle(requests=5, lengths={2: 600})
    done = warm_engine.run(work.run_command(bundle))
    answers = work.answers(done.parts)
    refused = answers.pop(2)
    assert refused["error"]["code"] == "engine_error"
    assert "600" in refused["error"]["message"]
    assert "512" in refused["error"]["message"]
    assert refused["output_token_ids"] is None
    assert refused["prompt_tokens"] is None
    assert [row["error"] for row in answers.values()] == [None] * 4
    assert (done.counts.requests, done.counts.errors) == (5, 1)


def test_a_bundle_of_refused_requests_alone_ends(warm_engine: StartedEngine, work: Any) -> None:
    bundle = work.write_bundle(requests=2, lengths={0: 600, 1: 700})
    done = warm_engine.run(work.run_command(bundle))
    assert (done.counts.requests, done.counts.errors) == (2, 2)


def test_sampling_of_the_job_and_of_single_rows_reaches_the_engine(warm_engine: StartedEngine, work: Any) -> None:
    def tokens(bundle: Any, sampling: SamplingParameters) -> list[list[int]]:
        done = warm_engine.run(work.run_command(bundle, sampling=sampling))
        return [row["output_token_ids"] for row in work.answers(done.parts).values()]

    plain = work.write_bundle("plain", requests=3, max_tokens=8)
    mixed = work.write_bundle("mixed", requests=3, max_tokens=8, sampling={1: json.dumps({"temperature": 0.0})})
    hot = SamplingParameters(temperature=2.0, seed=7)
    greedy = tokens(plain, SamplingParameters())
    sampled = tokens(mixed, hot)
    assert sampled == tokens(mixed, hot)
    assert sampled[1] == greedy[1]
    assert sampled[0] != greedy[0]
    assert sampled[2] != greedy[2]


def test_a_stop_text_ends_a_completion(warm_engine: StartedEngine, work: Any) -> None:
    whole = work.write_bundle("whole", requests=1, max_tokens=8)
    text = work.read(warm_engine.run(work.run_command(whole)).parts)[0]["completion"]
    stop = text[len(text) // 2 :]
    bundle = work.write_bundle("stopped", requests=1, max_tokens=8, sampling={0: json.dumps({"stop": [stop]})})
    row = work.read(warm_engine.run(work.run_command(bundle)).parts)[0]
    assert row["finish_reason"] == "stop"
    assert row["completion"] == text.partition(stop)[0]


def test_requests_in_known_parts_are_counted_but_not_computed_again(warm_engine: StartedEngine, work: Any) -> None:
    bundle = work.write_bundle(requests=10)
    first = warm_engine.run(work.run_command(bundle, part_rows=4))
    known = first.parts[:2]
    again = warm_engine.run(work.run_command(bundle, known_parts=known))
    assert again.parts[:2] == known
    assert again.counts.requests == 10
    assert again.counts.completion_tokens == first.counts.completion_tokens
    assert work.answers(again.parts[2:]).keys() == work.answers(first.parts[2:]).keys()


def test_a_missing_bundle_fails_for_good_and_leaves_the_engine_warm(warm_engine: StartedEngine, work: Any) -> None:
    bundle = work.write_bundle()
    work.store.delete([bundle.name])
    with pytest.raises(TerminalError, match="no such object") as caught:
        warm_engine.run(work.run_command(bundle))
    assert caught.value.bundle == bundle.name
    assert warm_engine.driver.usable
    assert warm_engine.run(work.run_command(work.write_bundle())).counts.requests == 12
