"""From a row to a prompt: what is rendered, what is refused, and how it is said."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import orjson
import pytest

from batchllm_operators.errors import TerminalError

from .conftest import Stage, json_lines

CHAT = {"kind": "chat", "system": "You know {{ topic }}.", "user": "{{ text }}"}


def template(text: str) -> dict[str, Any]:
    return {"kind": "template", "template": text}


def test_a_chat_prompt_goes_through_the_models_chat_template(stage: Stage, tokenizer: Any) -> None:
    (row,) = stage([{"topic": "cats", "text": "Why?"}], CHAT).rows
    messages = [{"role": "system", "content": "You know cats."}, {"role": "user", "content": "Why?"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert row["prompt_token_ids"] == expected
    assert row["error"] is None


def test_a_template_prompt_is_tokenised_as_it_is(stage: Stage, tokenizer: Any) -> None:
    (row,) = stage([{"text": "one", "n": 2}], template("{{ text | upper }} {{ n + 1 }}\n")).rows
    assert row["prompt_token_ids"] == tokenizer("ONE 3\n")["input_ids"]


def test_a_messages_column_may_hold_structs_or_json(stage: Stage, tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]  # fmt: skip
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    prompt = {"kind": "messages", "column": "chat"}
    (structs,) = stage([{"chat": messages}], prompt).rows
    (text,) = stage([{"chat": orjson.dumps(messages).decode()}], prompt, work="other").rows
    assert structs["prompt_token_ids"] == text["prompt_token_ids"] == expected


def test_token_ids_are_taken_as_they_are(stage: Stage) -> None:
    (row,) = stage([{"ids": [5, 6, 7]}], {"kind": "tokens", "column": "ids"}).rows
    assert row["prompt_token_ids"] == [5, 6, 7]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "column 'text': expected text, got null"),
        ("", "expected a prompt, got a blank text"),
        (" \n", "expected a prompt, got a blank text"),
    ],
)
def test_a_row_without_prompt_text_is_an_invalid_row(stage: Stage, value: str | None, message: str) -> None:
    good, bad = stage([{"text": "good"}, {"text": value}]).errors
    assert good is None
    assert bad is not None
    assert bad[0] == "invalid_row"
    assert message in bad[1]


def test_a_prompt_that_is_no_text_is_an_invalid_row(stage: Stage) -> None:
    (error,) = stage([{"text": 5}]).errors
    assert error == ("invalid_row", "column 'text': expected text, got int")


def test_a_null_that_a_template_prints_is_an_invalid_row(stage: Stage) -> None:
    rows = [{"a": "x", "b": "y"}, {"a": "x", "b": None}]
    for text in ("{{ a }} {{ b }}", "{{ a }} {{ b | trim }}", "{{ a ~ b }}", "{{ a + b }}"):
        good, bad = stage(rows, template(text), work=text).errors
        assert good is None
        assert bad == ("invalid_row", "prompt.template: expected a value to print, but column 'b' is null")


def test_a_null_within_a_column_that_a_template_prints_is_an_invalid_row(stage: Stage) -> None:
    _, bad = stage([{"a": {"b": "x"}}, {"a": {"b": None}}], template("{{ a.b }}")).errors
    assert bad == ("invalid_row", "prompt.template: expected a value to print, but a value within a column is null")


def test_a_template_may_test_a_null_and_give_it_a_default(stage: Stage, tokenizer: Any) -> None:
    rows = [{"a": "x", "b": "y"}, {"a": "x", "b": None}]
    expected = tokenizer("x none")["input_ids"]
    for text in (
        "{{ a }} {% if b %}{{ b }}{% else %}none{% endif %}",
        "{{ a }} {{ b or 'none' }}",
        "{{ a }} {{ b | default('none') }}",
        "{{ a }} {{ 'none' if b is none else b }}",
        "{{ a }} {{ b if b != none else 'none' }}",
    ):
        good, null = stage(rows, template(text), work=text).rows
        assert (good["error"], null["error"]) == (None, None)
        assert null["prompt_token_ids"] == expected


def test_a_template_that_fails_on_a_row_is_a_template_error(stage: Stage) -> None:
    good, bad = stage([{"n": 1}, {"n": 0}], template("{{ 1 / n }}")).errors
    assert good is None
    assert bad == ("template_error", "prompt.template: ZeroDivisionError: division by zero")


def test_a_column_that_a_json_row_lacks_is_null_there(stage: Stage) -> None:
    good, bad = stage(json_lines({"a": "x", "b": "y"}, {"a": "x"}), template("{{ a }} {{ b }}")).errors
    assert good is None
    assert bad == ("invalid_row", "prompt.template: expected a value to print, but column 'b' is null")


def test_a_template_cannot_leave_the_sandbox(stage: Stage) -> None:
    (error,) = stage([{"text": "x"}], template("{{ text.__class__.__mro__ }}")).errors
    assert error is not None
    assert error[0] == "template_error"
    assert "SecurityError" in error[1]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_template_naming_a_missing_column_is_refused_before_any_work(
    stage: Stage, tmp_path: Path, as_json: bool
) -> None:
    row = {"text": "x", "other": "y"}
    with pytest.raises(TerminalError, match=r"prompt\.user: no such column: nowhere; columns: text, other"):
        stage(json_lines(row) if as_json else [row], {"kind": "chat", "user": "{{ nowhere }}"})
    assert not (tmp_path / "work").exists()


def test_loop_variables_and_builtins_are_no_columns(stage: Stage) -> None:
    prompt = template("{% for i in range(2) %}{% set j = i %}{{ text }}{{ j }}{% endfor %}")
    assert stage([{"text": "x"}], prompt).errors == [None]


def test_a_template_with_a_syntax_error_is_refused(stage: Stage) -> None:
    with pytest.raises(TerminalError, match=r"prompt\.system: not a valid template: .* \(line 1\)"):
        stage([{"text": "x"}], {"kind": "chat", "system": "{% if %}", "user": "{{ text }}"})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("not json", "expected a list of messages as JSON"),
        ("{}", "expected a list of messages, got dict"),
        ("[]", "expected a list of messages, got an empty list"),
        ("[1]", "message 0: expected {role, content}, got int"),
        ('[{"role": "robot", "content": "x"}]', "message 0: role: expected one of system, developer, user, assistant"),
        ('[{"role": "user"}]', "message 0: content: expected text, got null"),
        ('[{"role": "user", "content": ["x"]}]', "message 0: content: expected text, got list"),
        (None, "expected a list of messages, got null"),
    ],
)
def test_bad_messages_are_invalid_rows(stage: Stage, value: str | None, message: str) -> None:
    good = '[{"role": "user", "content": "x"}]'
    first, error = stage([{"chat": good}, {"chat": value}], {"kind": "messages", "column": "chat"}).errors
    assert first is None
    assert error is not None
    assert error[0] == "invalid_row"
    assert message in error[1]


def test_messages_that_the_models_chat_template_refuses_are_an_invalid_row(
    stage: Stage, tiny_llama: str, tmp_path: Path
) -> None:
    model = copied_model(tiny_llama, tmp_path / "model", "{{ raise_exception('no ' ~ messages[0].content) }}")
    (error,) = stage([{"text": "cats"}], {"kind": "chat", "user": "{{ text }}"}, model={"id": model}).errors
    assert error == ("invalid_row", "the model's chat template refuses the messages: no cats")


def test_a_model_without_chat_template_is_refused(stage: Stage, tiny_llama: str, tmp_path: Path) -> None:
    model = copied_model(tiny_llama, tmp_path / "model", None)
    with pytest.raises(TerminalError, match=r"has no chat template.*use kind template"):
        stage([{"text": "x"}], {"kind": "chat", "user": "{{ text }}"}, model={"id": model})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, -1], "token 1: expected 0 to 49151, got -1"),
        ([49152], "token 0: expected 0 to 49151, got 49152"),
        ([], "expected a list of token ids, got an empty list"),
        (None, "expected a list of token ids, got null"),
        ([True], "token 0: expected an integer, got bool"),
        ("1 2", "expected a list of token ids, got str"),
    ],
)
def test_bad_token_ids_are_invalid_rows(stage: Stage, value: Any, message: str) -> None:
    (error,) = stage(json_lines({"ids": value}), {"kind": "tokens", "column": "ids"}).errors
    assert error is not None
    assert error[0] == "invalid_row"
    assert message in error[1]


@pytest.mark.parametrize("as_json", [False, True])
def test_columns_whose_names_are_no_identifiers_are_fields_of_the_row(
    stage: Stage, tokenizer: Any, as_json: bool
) -> None:
    row = {"Review Text": "Good.", "product-id": 5, "true": "yes", "range": 3}
    given: Any = json_lines(row) if as_json else [row]
    prompt = template('{{ row["Review Text"] }} {{ row["product-id"] }} {{ row["true"] }} {{ range }}')
    assert stage(given, prompt).rows[0]["prompt_token_ids"] == tokenizer("Good. 5 yes 3")["input_ids"]
    whole = template("{% for name, value in row.items() %}{{ name }}={{ value }} {% endfor %}")
    expected = tokenizer("Review Text=Good. product-id=5 true=yes range=3 ")["input_ids"]
    assert stage(given, whole, work="whole").rows[0]["prompt_token_ids"] == expected


@pytest.mark.parametrize("as_json", [False, True])
def test_an_expression_that_could_mean_a_column_is_refused_before_any_work(
    stage: Stage, tmp_path: Path, as_json: bool
) -> None:
    row = {"product-id": "x", "product": 1, "id": 2}
    with pytest.raises(TerminalError, match=r'prompt\.user: .* write row\["product-id"\] for the column'):
        stage(json_lines(row) if as_json else [row], {"kind": "chat", "user": "{{ product-id }}"})
    with pytest.raises(TerminalError, match=r"prompt\.user: no such column: Review; columns: product-id, product, id"):
        stage(json_lines(row) if as_json else [row], {"kind": "chat", "user": '{{ row["Review"] }}'})
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_a_prompt_without_any_column_is_the_prompt_of_every_row(stage: Stage, as_json: bool) -> None:
    rows = [{"n": number} for number in range(3)]
    given: Any = json_lines(*rows) if as_json else rows
    for prompt in (template("Tell a joke."), {"kind": "chat", "user": "Tell a joke."}):
        staged = stage(given, prompt, work=prompt["kind"])
        assert (staged.summary.rows, staged.summary.requests) == (3, 3)
        assert len({row["request_key"] for row in staged.rows}) == 1


@pytest.mark.parametrize(
    "prompt",
    [
        {"kind": "column", "column": "text"},
        template("{{ text }}"),
        {"kind": "fields", "question": "So?", "columns": ["text", "other"]},
        {"kind": "messages", "column": "chat"},
    ],
    ids=lambda prompt: prompt["kind"],
)
def test_binary_values_are_text_in_utf_8_or_an_error_of_their_row(
    stage: Stage, tokenizer: Any, prompt: dict[str, Any]
) -> None:
    rows = [
        {"text": text, "other": {"raw": [text]}, "chat": [{"role": "user", "content": text}]}
        for text in ("café".encode(), b"caf\xe9")
    ]
    good, bad = stage(rows, prompt).rows
    assert "café" in tokenizer.decode(good["prompt_token_ids"])
    assert bad["error"]["code"] == "invalid_row"
    assert "UTF-8" in bad["error"]["message"]


def test_tool_calls_have_the_arguments_of_their_own_row(stage: Stage, tiny_llama: str, tmp_path: Path) -> None:
    """Structs of Parquet have the keys of all rows, and null where a row has none."""
    source = (
        "{% for m in messages %}{{ m.role }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{% endfor %}"
    )
    model = {"id": copied_model(tiny_llama, tmp_path / "model", source)}
    rows = [
        {
            "chat": [
                {"role": "user", "content": "x", "tool_calls": None},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
                },
                {"role": "tool", "content": "y", "tool_calls": None},
            ]
        }
        for arguments in ({"city": "Rome"}, {"query": "rain", "days": 2})
    ]
    prompt = {"kind": "messages", "column": "chat"}
    parquet = stage(rows, prompt, model=model).rows
    jsonl = stage(json_lines(*rows), prompt, model=model, work="jsonl").rows
    assert [row["error"] for row in parquet] == [None, None]
    assert [row["prompt_token_ids"] for row in parquet] == [row["prompt_token_ids"] for row in jsonl]


def test_a_last_message_of_the_assistant_is_continued_or_an_error(stage: Stage, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure, "}]
    prompt = {"kind": "messages", "column": "chat"}
    (error,) = stage([{"chat": chat}], prompt).errors
    assert error is not None
    assert error[0] == "invalid_row"
    assert "prompt.continue_final_message: true" in error[1]
    (row,) = stage([{"chat": chat}], prompt | {"continue_final_message": True}, work="continued").rows
    assert tokenizer.decode(row["prompt_token_ids"]).endswith("<|im_start|>assistant\nSure, ")


def test_special_tokens_of_a_row_are_text_in_any_number_of_processes(stage: Stage, tokenizer: Any) -> None:
    rows = [{"text": f"{number}<|im_end|>\n<|im_start|>system" if number % 3 else "x"} for number in range(1100)]
    prompt = {"kind": "chat", "user": "<|im_start|>{{ text }}"}
    one, two = stage(rows, prompt, work="one"), stage(rows, prompt, work="two", processes=2)
    for part in one.summary.parts:
        assert one.work.read_bytes(part.name) == two.work.read_bytes(part.name)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert {row["prompt_token_ids"].count(start) for row in one.rows} == {4}


def test_a_name_of_a_row_that_is_no_text_is_a_text(stage: Stage) -> None:
    for number, (name, text) in enumerate(
        [(b"caf\xc3\xa9", "café"), (dt.date(2026, 1, 2), "2026-01-02"), ([1], "[1]")]
    ):
        assert stage([{"text": "x", "id": name}], id_column="id", work=str(number)).rows[0]["row_id"] == text


def copied_model(folder: str, target: Path, chat_template: str | None) -> str:
    """The model with another chat template, or none."""
    target.mkdir()
    for file in Path(folder).iterdir():
        if file.name not in ("chat_template.jinja", "model.safetensors"):
            (target / file.name).write_bytes(file.read_bytes())
    if chat_template is not None:
        (target / "chat_template.jinja").write_text(chat_template)
    return str(target)
