"""Limits of the model, sampling of single rows, and identity of requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.plan.planning import plan_requests
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.planning import PlanningSpec
from batchllm_operators.stage.tokenizing import model_limits

from .conftest import Stage, json_lines

TOKENS = {"kind": "tokens", "column": "ids"}


def test_a_prompt_without_room_for_a_completion_is_too_long(stage: Stage) -> None:
    staged = stage([{"ids": [1] * 9}, {"ids": [1] * 10}], TOKENS, model={"max_model_len": 10})
    good, bad = staged.errors
    assert good is None
    assert bad == (
        "prompt_too_long", "the prompt has 10 tokens and max_model_len is 10: no room for a completion"
    )  # fmt: skip
    assert staged.summary.error_rows == {"prompt_too_long": 1}
    assert (staged.summary.requests, staged.summary.prompt_tokens) == (1, 9)


def test_max_tokens_is_reduced_where_the_prompt_fits_and_the_completion_would_not(stage: Stage) -> None:
    rows = stage(
        [{"ids": [1] * 4}, {"ids": [1] * 8}], TOKENS, model={"max_model_len": 10}, sampling={"max_tokens": 5}
    ).rows
    assert [row["max_tokens"] for row in rows] == [5, 2]
    assert [row["sampling"] for row in rows] == [None, None]


def test_limits_come_from_the_models_configuration(tiny_llama: str) -> None:
    limits = model_limits(ModelSpec(id=tiny_llama))
    config = orjson.loads((Path(tiny_llama) / "config.json").read_bytes())
    assert limits.max_model_len == config["max_position_embeddings"]
    assert limits.vocab_size == config["vocab_size"]
    assert model_limits(ModelSpec(id=tiny_llama, max_model_len=77)).max_model_len == 77


def test_a_model_path_that_does_not_exist_is_named(stage: Stage, tmp_path: Path) -> None:
    missing = str(tmp_path / "no-model")
    with pytest.raises(TerminalError, match=rf"model\.id: no such folder: '{missing}'"):
        stage([{"text": "x"}], model={"id": missing})


def test_a_folder_that_is_no_model_is_named(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(TerminalError, match=r"model\.id: not a model in Hugging Face layout \(no config\.json\)"):
        stage([{"text": "x"}], model={"id": str(tmp_path)})


def test_a_damaged_model_configuration_is_named(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TerminalError, match=r"model\.id: cannot load the configuration of"):
        stage([{"text": "x"}], model={"id": str(tmp_path)})


def test_a_hub_id_that_cannot_be_reached_is_named(stage: Stage) -> None:
    with pytest.raises(TerminalError, match=r"model\.id: cannot load the configuration of 'nobody/no-such-model'"):
        stage([{"text": "x"}], model={"id": "nobody/no-such-model"})


@pytest.mark.parametrize("as_json", [False, True])
def test_a_row_may_override_sampling(stage: Stage, as_json: bool) -> None:
    override: Any = {"max_tokens": 7, "temperature": 0.5, "stop": "END"}
    rows = [{"text": "x", "s": orjson.dumps(override).decode() if as_json else override}, {"text": "x", "s": None}]
    first, second = stage(rows, sampling={"override_column": "s", "seed": 3, "max_tokens": 9}).rows
    assert (first["max_tokens"], second["max_tokens"]) == (7, 9)
    assert second["sampling"] is None
    assert orjson.loads(first["sampling"]) == {
        "temperature": 0.5, "top_p": 1.0, "seed": 3, "max_tokens": 7, "stop": ["END"]
    }  # fmt: skip
    assert first["request_key"] != second["request_key"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1, got 0"),
        ({"temprature": 1}, "unknown key 'temprature'; did you mean 'temperature'?"),
        ({"temperature": "hot"}, "temperature: Input should be a valid number"),
        ({"logit_bias": {"99999": 1.0}}, "logit_bias: expected token ids from 0 to 49,151, got 99999"),
        ({"stop_token_ids": [-1]}, "stop_token_ids: expected token ids from 0 to 49,151, got -1"),
        ({"allowed_token_ids": []}, "allowed_token_ids: expected at least one token, got none"),
        ({"min_tokens": 300}, "min_tokens: expected at most max_tokens 256, got 300"),
        ({"expected_output_tokens": 0}, "expected_output_tokens: Input should be greater than or equal to 1, got 0"),
        ({"expected_output_tokens": -7}, "expected_output_tokens: Input should be greater than or equal to 1, got -7"),
        ({"expected_output_tokens": 2.5}, "expected_output_tokens: Input should be a valid integer"),
        ({"expected_output_tokens": "long"}, "expected_output_tokens: Input should be a valid integer"),
        ("[1]", "expected sampling fields, got list"),
        ("{", "expected a JSON object"),
    ],
)
def test_a_bad_override_is_an_invalid_row(stage: Stage, override: Any, message: str) -> None:
    rows = json_lines({"text": "x", "s": override}, {"text": "y", "s": None})
    bad, good = stage(rows, sampling={"override_column": "s"}).errors
    assert good is None
    assert bad is not None
    assert bad[0] == "invalid_row"
    assert "column 's'" in bad[1]
    assert message in bad[1]


def test_every_sampling_field_of_a_row_counts_in_its_request(stage: Stage) -> None:
    overrides: list[Any] = [
        None, {"top_k": 5}, {"top_k": -1}, {"logit_bias": {"7": 1.5}}, {"bad_words": "no"},
        {"repetition_detection": {"max_pattern_size": 3, "min_count": 2}},
    ]  # fmt: skip
    rows = stage(
        json_lines(*({"text": "x", "s": override} for override in overrides)), sampling={"override_column": "s"}
    ).rows
    keys = [row["request_key"] for row in rows]
    assert keys[2] == keys[0], "another way to say that all tokens count"
    assert len(set(keys)) == 5
    assert orjson.loads(rows[3]["sampling"])["logit_bias"] == {"7": 1.5}
    assert "top_k" not in orjson.loads(rows[3]["sampling"]), "what is not set changes no key, and no key of old"


def test_a_struct_and_a_map_of_parquet_override_too(stage: Stage, tmp_path: Path) -> None:
    kind = pa.struct({"logit_bias": pa.map_(pa.int32(), pa.float64()), "top_k": pa.int64()})
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["x"], "s": pa.array([{"logit_bias": [(7, 1.5)], "top_k": None}], kind)}), path)
    (row,) = stage(path, format="parquet", sampling={"override_column": "s"}).rows
    assert orjson.loads(row["sampling"])["logit_bias"] == {"7": 1.5}


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids"])
def test_token_ids_that_the_model_does_not_have_are_refused_in_a_job(stage: Stage, field: str) -> None:
    with pytest.raises(TerminalError, match=rf"sampling\.{field}: expected token ids from 0 to 49,151, got 49152"):
        stage([{"text": "x"}], sampling={field: [49151, 49152]})


def test_a_shorter_completion_needs_no_more_tokens_than_it_has(stage: Stage) -> None:
    rows = [{"ids": list(range(7)), "s": {"min_tokens": 5}}]
    (row,) = stage(rows, TOKENS, model={"max_model_len": 10}, sampling={"override_column": "s"}).rows
    assert orjson.loads(row["sampling"]) | {"max_tokens": 3, "min_tokens": 3} == orjson.loads(row["sampling"])


ESTIMATES = "expected_output_tokens"


def test_a_row_may_say_how_long_its_completion_will_be(stage: Stage) -> None:
    """The estimate reaches the plan, is held within max_tokens, and is no part of the request."""
    overrides: list[Any] = [{ESTIMATES: 3}, None, {ESTIMATES: 10**18}, {ESTIMATES: 9, "max_tokens": 7}, {ESTIMATES: 3}]
    rows = [{"text": f"row {number}", "s": override} for number, override in enumerate(overrides)]
    rows[4]["text"] = "row 1"
    staged = stage(json_lines(*rows), sampling={"override_column": "s", "max_tokens": 50})
    found = staged.rows
    assert [row[ESTIMATES] for row in found] == [3, None, 50, 7, 3]
    assert [row["max_tokens"] for row in found] == [50, 50, 50, 7, 50]
    assert [row["sampling"] is None for row in found] == [True, True, True, False, True]
    assert found[1]["request_key"] == found[4]["request_key"]
    plan = plan_requests(staged.work, staged.summary, PlanningSpec())
    assert plan.forecast.estimate_sources == {"row": 3, "max_tokens": 1}
    assert plan.forecast.output_tokens == 3 + 50 + 50 + 7


def test_an_estimate_is_held_within_the_room_that_the_prompt_leaves(stage: Stage) -> None:
    rows = json_lines({"ids": [1] * 8, "s": {ESTIMATES: 5}})
    (row,) = stage(rows, TOKENS, model={"max_model_len": 10}, sampling={"override_column": "s"}).rows
    assert (row["max_tokens"], row[ESTIMATES]) == (2, 2)


def test_a_job_without_override_column_has_no_column_of_estimates(stage: Stage) -> None:
    assert ESTIMATES not in stage([{"text": "x"}]).rows[0]


def test_a_struct_column_may_hold_estimates(stage: Stage) -> None:
    rows = [{"text": "x", "s": {ESTIMATES: 4, "max_tokens": None}}, {"text": "y", "s": {ESTIMATES: None}}]
    staged = stage(rows, sampling={"override_column": "s"})
    assert [row[ESTIMATES] for row in staged.rows] == [4, None]


def test_equal_rows_share_a_key_where_sampling_is_deterministic(stage: Stage) -> None:
    one, two, other = stage([{"text": "x"}, {"text": "x"}, {"text": "y"}]).rows
    assert one["request_key"] == two["request_key"] != other["request_key"]


def test_equal_rows_get_answers_of_their_own_where_sampling_is_random(stage: Stage) -> None:
    one, two = stage([{"text": "x"}, {"text": "x"}], sampling={"temperature": 1.0}).rows
    assert one["request_key"] != two["request_key"]
    one, two = stage([{"text": "x"}, {"text": "x"}], sampling={"temperature": 1.0, "seed": 1}, work="seeded").rows
    assert one["request_key"] == two["request_key"]


def test_an_id_column_names_the_rows(stage: Stage) -> None:
    rows = [{"text": "x", "id": 17}, {"text": "y", "id": None}]
    assert [row["row_id"] for row in stage(rows, id_column="id").rows] == ["17", "1"]
    assert [row["row_id"] for row in stage(rows, work="other").rows] == ["0", "1"]


def test_missing_id_and_override_columns_are_refused(stage: Stage) -> None:
    with pytest.raises(TerminalError, match=r"source\.id_column: no such column: id; columns: text"):
        stage([{"text": "x"}], id_column="id")
    with pytest.raises(TerminalError, match=r"sampling\.override_column: no such column: s; columns: text"):
        stage([{"text": "x"}], sampling={"override_column": "s"})
