"""Prompts of fields whose order does not matter to the question."""

from __future__ import annotations

import datetime as dt
import os
import random
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from batchllm_operators.errors import TerminalError
from batchllm_operators.plan.markdown import plan_markdown
from batchllm_operators.plan.planning import plan_requests
from batchllm_operators.records import FieldSharing
from batchllm_operators.specs.planning import PlanningSpec
from batchllm_operators.stage.progress import StageStep

from .conftest import PROMPT, Stage, Staged, json_lines

QUESTION = "Is the review about the film?"


def fields(*columns: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "fields", "question": QUESTION, "columns": list(columns)} | changes


def contents(staged: Staged, tokenizer: Any) -> list[str]:
    """What stands below the question in each prompt."""
    texts = [tokenizer.decode(row["prompt_token_ids"]) for row in staged.rows]
    return [text.partition(f"{QUESTION}\n\n")[2].partition("<|im_end|>")[0] for text in texts]


def reviews(count: int, films: int = 10) -> list[dict[str, Any]]:
    chance = random.Random(0)
    rows = [
        {"review": f"review {number}", "film": chance.randrange(films), "stars": number % 5} for number in range(count)
    ]
    return [row | {"info": f"what there is to say of film {row['film']} " * 6} for row in rows]


def test_fields_stand_below_the_question_and_go_through_the_chat_template(stage: Stage, tokenizer: Any) -> None:
    prompt = fields("film", "review", system="You know films.")
    (row,) = stage([{"review": 'so "so"', "film": "Ran", "other": 1}], prompt, field_order="as_given").rows
    messages = [
        {"role": "system", "content": "You know films."},
        {"role": "user", "content": f'{QUESTION}\n\n{{"film": "Ran", "review": "so \\"so\\""}}'},
    ]
    assert row["prompt_token_ids"] == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_fields_may_be_lines_without_a_system_message(stage: Stage, tokenizer: Any) -> None:
    (row,) = stage([{"film": "Ran", "stars": 4.5}], fields("film", "stars", format="lines")).rows
    messages = [{"role": "user", "content": f"{QUESTION}\n\nfilm: Ran\nstars: 4.5"}]
    assert row["prompt_token_ids"] == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_braces_of_a_question_are_no_template(stage: Stage, tokenizer: Any) -> None:
    staged = stage([{"a": 1, "b": 2}], fields("a", "b", question="Is {{ a }} so?", system="{% if %}"))
    assert "Is {{ a }} so?" in tokenizer.decode(staged.rows[0]["prompt_token_ids"])


@pytest.mark.parametrize("as_json", [False, True])
def test_a_null_is_written_as_null_and_in_lines_as_nothing(stage: Stage, tokenizer: Any, as_json: bool) -> None:
    rows = [{"a": "x", "b": None}]
    given: Any = json_lines({"a": "x"}) if as_json else rows
    options: dict[str, Any] = {"field_order": "as_given"}
    if as_json:  # a first row tells that there is a column b
        given = json_lines({"a": "y", "b": "z"}) + given
    assert contents(stage(given, fields("b", "a"), **options), tokenizer)[-1] == '{"b": null, "a": "x"}'
    lines = stage(given, fields("b", "a", format="lines"), work="lines", **options)
    assert contents(lines, tokenizer)[-1] == "b:\na: x"


def test_values_that_are_no_texts_are_written_as_json(stage: Stage, tokenizer: Any) -> None:
    row = {"day": dt.date(2026, 1, 2), "price": Decimal("9.90"), "tags": ["a", "b"], "who": {"name": "Ada"}, "no": 1}
    staged = stage([row], fields("day", "price", "tags", "who"), field_order="as_given")
    assert contents(staged, tokenizer) == [
        '{"day": "2026-01-02", "price": "9.90", "tags": ["a","b"], "who": {"name":"Ada"}}'
    ]


def test_a_row_without_any_value_is_an_invalid_row(stage: Stage) -> None:
    good, bad = stage([{"a": "x", "b": None}, {"a": None, "b": None}], fields("a", "b")).errors
    assert good is None
    assert bad == ("invalid_row", "prompt.columns: expected a value in at least one column, but all are null")


def test_bytes_that_are_no_text_are_an_invalid_row(stage: Stage) -> None:
    good, bad = stage([{"a": "x", "b": None}, {"a": "x", "b": b"\xff"}], fields("a", "b")).errors
    assert good is None
    assert bad is not None
    assert bad[0] == "invalid_row"
    assert bad[1].startswith("column 'b': expected text in UTF-8, got byte 0xff at position 0")


def test_a_line_that_is_no_json_stays_a_row_error(stage: Stage, tokenizer: Any) -> None:
    staged = stage(json_lines({"a": 1, "b": 2}) + b"{\n" + json_lines({"a": 1, "b": 3}), fields("a", "b"))
    assert [error and error[0] for error in staged.errors] == [None, "invalid_row", None]
    assert staged.summary.requests == 2


def test_a_missing_column_is_refused_before_any_work(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(TerminalError, match=r"prompt\.columns: no such column: c; columns: a, b"):
        stage([{"a": 1, "b": 2}], fields("a", "c"))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": ["a"]}, "at least 2 items"),
        ({"columns": ["a", "b", "a"]}, "expected distinct columns, got 'a' more than once"),
        ({"columns": [f"c{number}" for number in range(64)]}, "at most 63 items"),
        ({"question": " \n"}, "should match pattern"),
        ({"format": "yaml"}, "Input should be 'json' or 'lines'"),
        ({"colums": ["a", "b"]}, "did you mean 'columns'?"),
    ],
)
def test_a_wrong_part_is_refused_with_what_was_expected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PROMPT.validate_python(fields("a", "b") | changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_order_is_chosen_over_the_whole_input_and_no_field_is_lost(
    stage: Stage, tokenizer: Any, as_json: bool
) -> None:
    rows = reviews(3000)
    prompt = fields("review", "info", "stars")
    staged = stage(json_lines(*rows) if as_json else rows, prompt)
    found = [orjson.loads(text) for text in contents(staged, tokenizer)]
    assert found == [{name: row[name] for name in prompt["columns"]} for row in rows]
    assert {next(iter(one)) for one in found} == {"info"}
    sharing = staged.summary.field_sharing
    assert sharing is not None
    assert sharing.as_given == sharing.sorted_rows == 0
    assert sharing.chosen > 0.8


def test_rows_of_later_batches_get_their_own_order(stage: Stage, tokenizer: Any) -> None:
    first = [{"a": "left value " * 9, "b": f"{number}"} for number in range(1500)]
    second = [{"a": f"{number}", "b": "right value " * 9} for number in range(1500)]
    found = contents(stage(first + second, fields("a", "b")), tokenizer)
    assert all(text.startswith('{"a"') for text in found[:1500])
    assert all(text.startswith('{"b"') for text in found[1500:])


def test_as_given_keeps_the_order_of_the_job_and_reads_the_input_once(stage: Stage, tokenizer: Any) -> None:
    steps: list[StageStep] = []
    staged = stage(
        reviews(20), fields("review", "info"), field_order="as_given", progress=lambda step, _: steps.append(step)
    )
    assert all(text.startswith('{"review"') for text in contents(staged, tokenizer))
    assert staged.summary.field_sharing is None
    assert set(steps) == {StageStep.STAGE}


def test_reading_the_fields_is_a_step_of_the_progress(stage: Stage) -> None:
    seen: list[tuple[StageStep, int]] = []
    stage(reviews(1500), fields("review", "info"), progress=lambda step, rows: seen.append((step, rows)))
    assert seen == [
        (StageStep.SCAN_FIELDS, 1024), (StageStep.SCAN_FIELDS, 1500), (StageStep.STAGE, 1024), (StageStep.STAGE, 1500),
    ]  # fmt: skip


def test_the_number_of_processes_changes_no_byte_of_prompts_with_fields(stage: Stage) -> None:
    rows = [row | {"review": None} if number % 9 == 0 else row for number, row in enumerate(reviews(5000))]
    prompt = fields("review", "info", "stars")
    one, two = stage(rows, prompt, work="one"), stage(rows, prompt, work="two", processes=2)
    for part in one.summary.parts:
        assert one.work.read_bytes(part.name) == two.work.read_bytes(part.name)
    assert one.summary.field_sharing == two.summary.field_sharing


def test_an_input_without_rows_has_an_order_without_rows(stage: Stage) -> None:
    assert stage(b"", fields("a", "b")).summary.field_sharing == FieldSharing(as_given=0, sorted_rows=0, chosen=0)


def test_the_chosen_order_saves_prompt_tokens_and_the_plan_says_how_many(stage: Stage) -> None:
    prompt = fields("review", "info", "stars")
    plans = {}
    for choice in ("as_given", "optimise"):
        staged = stage(reviews(300), prompt, field_order=choice, work=choice)
        plans[choice] = plan_requests(staged.work, staged.summary, PlanningSpec(block_size=8))
    assert plans["optimise"].saving.planned > plans["as_given"].saving.planned + 0.3
    page = plan_markdown(plans["optimise"])
    assert "order of the fields is chosen row by row" in page
    assert "fields as given: 0.0%; rows as given too: 0.0%" in page
    assert "order of the fields" not in plan_markdown(plans["as_given"])


def test_reading_the_fields_keeps_no_text(tmp_path: Path) -> None:
    """Four times the rows must not take noticeably more memory; 300 MB of texts pass through, no two equal."""
    peaks = []
    for groups in (8, 32):
        path = tmp_path / f"{groups}.parquet"
        with pq.ParquetWriter(path, pa.schema([("text", pa.string()), ("other", pa.string())])) as writer:
            for _ in range(groups):
                texts = [os.urandom(2500).hex() for _ in range(2000)]
                writer.write_table(pa.table({"text": texts, "other": ["x"] * 2000}))
        script = (
            "import resource, sys\n"
            "from batchllm_operators.stage.field_scan import scan_fields\n"
            "from batchllm_operators.formats import open_source\n"
            "from batchllm_operators.specs.source import SourceSpec\n"
            "source = open_source(SourceSpec(uri=sys.argv[1], format='parquet'))\n"
            "order = scan_fields(source, ['text', 'other'], lambda rows: None)\n"
            "assert (order.fields == [1, 0]).all()\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        )
        done = subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < peaks[0] + 60, f"peak MiB of 80 and of 320 MB of text: {peaks}"
