"""JSON values on their way: as they were read in JSON Lines, with all their digits in Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import BATCH_ROWS
from batchllm_operators.stage.row_stager import RowStager
from tests.inputs.carried import ANSWER, Carried
from tests.inputs.conftest import Carry

BIG = "123456789012345678901234567890"


def lines(*texts: str) -> dict[str, bytes]:
    return {"a.jsonl": "\n".join(texts).encode()}


def carried_texts(output: Carried) -> list[str]:
    """What stands before the answer in each line."""
    return [line.decode().partition('"completion"')[0] for line in output.lines]


VERBATIM = [
    '{"v":1.0}', '{"v":"1.0"}', f'{{"v":{BIG}}}', f'{{"v":-{BIG}}}', '{"v":9223372036854775808}', '{"v":1e5}',
    '{"v":1.10}', '{"v":0.1000000000000000055511151231257827}', '{"v":-0}', '{ "v" : [ 1 , 2.50 ] }', '{"v":{}}',
    '{"v":null}', '{"other":true}', r'{"v":"\u00e9\n"}', '{"v":1,"v":2}', r'{"\u0076":"escaped name"}',
]  # fmt: skip


def test_rows_of_json_lines_stand_in_a_sink_of_json_lines_as_they_were_read(carry: Carry) -> None:
    output = carry(lines(*VERBATIM, "{}", '  {"v": 5}\t\r'), form="jsonl")
    assert output.errors == [None] * (len(VERBATIM) + 2)
    expected = [f"{text[:-1].rstrip()}," for text in VERBATIM]
    assert carried_texts(output) == [*expected, "{", '{"v": 5,']
    assert [{name: row[name] for name in ANSWER} for row in output.rows] == [ANSWER] * len(output.rows)


def test_values_of_many_types_are_json_text_in_parquet_with_all_their_digits(carry: Carry) -> None:
    column = carry(lines(*VERBATIM), form="jsonl").table["v"]
    assert column.type == pa.json_()
    assert column.to_pylist() == [
        "1.0", '"1.0"', BIG, f"-{BIG}", "9223372036854775808", "1e5", "1.10", "0.1000000000000000055511151231257827",
        "-0", "[ 1 , 2.50 ]", "{}", None, None, r'"\u00e9\n"', "2", '"escaped name"',
    ]  # fmt: skip


TYPED: list[tuple[str, list[str], str, list[Any]]] = [
    ("integers", ["1", "null", str(2**63 - 1)], "int64", [1, None, 2**63 - 1]),
    ("integers and fractions", ["1", "0.5"], "double", [1.0, 0.5]),
    ("fractions are doubles", ["0.1234567890123456789012345"], "double", [0.12345678901234568]),
    ("digits beside fractions", [str(2**53 + 1), "0.5"], "json", [str(2**53 + 1), "0.5"]),
    ("beyond 64 bits", ["1", BIG], "json", ["1", BIG]),
    ("texts", ['"a"', '""'], "string", ["a", ""]),
    ("booleans", ["true", "false"], "bool", [True, False]),
    ("booleans and numbers", ["true", "1"], "json", ["true", "1"]),
    ("objects", ['{"a":1}', '{"b":[]}'], "struct<a: int64, b: list<item: string>>",
     [{"a": 1, "b": None}, {"a": None, "b": []}]),
    ("objects of other types", ['{"a":1}', '{"a":"x"}'], "json", ['{"a":1}', '{"a":"x"}']),
    ("digits within", ['{"a":[9007199254740993]}', '{"a":[0.5]}'], "json",
     ['{"a":[9007199254740993]}', '{"a":[0.5]}']),
    ("only nulls", ["null", "null"], "string", [None, None]),
    ("empty lists", ["[]", "[1]"], "list<item: int64>", [[], [1]]),
    ("deep", ["[" * 30 + "]" * 30, "[]"], "json", ["[" * 30 + "]" * 30, "[]"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "kind", "expected"), TYPED, ids=[case[0] for case in TYPED])
@pytest.mark.parametrize("apart", [False, True])
def test_types_in_parquet_are_those_of_all_rows(
    carry: Carry, name: str, values: list[str], kind: str, expected: list[Any], apart: bool
) -> None:
    between = BATCH_ROWS if apart else 0
    rows = [f'{{"v":{values[0]}}}', *["{}"] * between, *(f'{{"v":{value}}}' for value in values[1:])]
    column = carry(lines(*rows), form="jsonl").table["v"]
    assert column.type == (pa.json_() if kind == "json" else column.type)
    assert kind == "json" or str(column.type).replace("element", "item") == kind
    assert column.to_pylist() == [expected[0], *[None] * between, *expected[1:]]


FAULTS = [
    ('{"v":1e400}', "number is infinity"),
    ('{"v":NaN}', "malformed JSON"),
    (r'{"v":"\ud800"}', "malformed JSON: no low surrogate"),
    (f'{{"v":{"9" * 5000}}}', "number is infinity"),
    (f'{{"v":{"[" * 300}{"]" * 300}}}', "expected values within values at most 200 deep"),
    (f'{{"v":{"[" * 2000}{"]" * 2000}}}', "malformed JSON: depth limit"),
    ('["v"]', "expected a JSON object, got list"),
]


@pytest.mark.parametrize(("text", "message"), FAULTS)
def test_what_cannot_be_read_is_its_rows_error(carry: Carry, text: str, message: str) -> None:
    output = carry(lines('{"v":1}', text), form="jsonl")
    assert output.errors[0] is None
    assert message in str(output.errors[1])
    assert output.rows[1] == {**dict.fromkeys(ANSWER), "error": output.rows[1]["error"]}
    assert output.column("v")[0] == [1, None]


def test_prompts_show_all_digits(carry: Carry, tokenizer: Any) -> None:
    output = carry(lines(f'{{"v":{BIG}}}'), form="jsonl", prompt={"kind": "template", "template": "{{ v }}"})
    assert output.tokens == [tokenizer(BIG)["input_ids"]]


def test_keys_of_a_row_alone_cost_the_others_nothing(carry: Carry) -> None:
    texts = [f'{{"id":{row},"key {row}":"a value of this row alone"}}' for row in range(500)]
    output = carry(lines(*texts), form="jsonl")
    assert [{name: value for name, value in row.items() if name not in ANSWER} for row in output.rows] == [
        orjson.loads(text) for text in texts
    ]
    answers = len(orjson.dumps(ANSWER))
    assert sum(map(len, output.lines)) < sum(map(len, texts)) + 500 * (answers + 10)
    assert output.table.num_columns == 501 + len(ANSWER)
    assert output.table["key 7"].to_pylist()[6:9] == [None, "a value of this row alone", None]


def test_objects_with_keys_of_their_own_are_json_text_in_parquet(carry: Carry) -> None:
    texts = [f'{{"v":{{"key {row}":1}}}}' for row in range(300)]
    output = carry(lines(*texts), form="jsonl")
    assert output.table["v"].to_pylist() == [f'{{"key {row}":1}}' for row in range(300)]
    assert output.rows[5]["v"] == {"key 5": 1}


def test_absent_stays_absent_in_json_lines_and_is_null_in_parquet(carry: Carry) -> None:
    calls = ['{"calls":[{"name":"f","arguments":{"query":"x"}}]}', '{"calls":[{"name":"g","arguments":{"n":1}}]}']
    output = carry(lines(*calls), form="jsonl")
    assert [row["calls"] for row in output.rows] == [orjson.loads(text)["calls"] for text in calls]
    assert output.table["calls"].to_pylist()[1] == [{"name": "g", "arguments": {"query": None, "n": 1}}]


def test_selected_columns_stand_as_they_were_read(carry: Carry) -> None:
    texts = [f'{{"a": 1.0, "b": {{"x": [1.50, "}}"]}}, "c": {BIG}}}', '{"c":null}', "bad"]
    output = carry(lines(*texts), form="jsonl", columns=["c", "b"])
    assert carried_texts(output) == [f'{{"c":{BIG},"b":{{"x": [1.50, "}}"]}},', '{"c":null,', "{"]
    assert output.table.column_names[:2] == ["c", "b"]


LATE = ['{"text":"x"}'] * BATCH_ROWS


def test_a_key_that_first_occurs_late_is_a_column(carry: Carry, tokenizer: Any) -> None:
    given = lines(*LATE, '{"text":"y","late":"z"}')
    prompt = {"kind": "template", "template": "{{ text }} {{ late or '-' }}"}
    output = carry(given, form="jsonl", prompt=prompt, columns=["late"])
    assert output.tokens == [tokenizer("x -")["input_ids"]] * BATCH_ROWS + [tokenizer("y z")["input_ids"]]
    assert output.table["late"].to_pylist() == [None] * BATCH_ROWS + ["z"]
    assert carry(given, name="id", form="jsonl", id_column="late").errors == [None] * (BATCH_ROWS + 1)


def test_a_key_that_never_occurs_is_no_column_and_all_others_are_named(carry: Carry, tmp_path: Path) -> None:
    given = lines(*LATE, '{"late":1}')
    prompt = {"kind": "template", "template": "{{ nowhere }}"}
    with pytest.raises(TerminalError, match="no such column: nowhere; columns: text, late"):
        carry(given, form="jsonl", prompt=prompt)
    with pytest.raises(TerminalError, match=r"source\.columns: no such column: nowhere; columns: text, late"):
        carry(given, form="jsonl", columns=["nowhere"])
    assert not (tmp_path / "job").exists()


def test_a_late_key_named_like_an_output_column_is_found_in_staging(carry: Carry, tmp_path: Path) -> None:
    with pytest.raises(TerminalError, match="names of output columns: completion"):
        carry(lines(*LATE, '{"completion":1}'), form="jsonl")
    assert not (tmp_path / "job" / "results").exists()


def test_a_late_key_named_like_an_output_column_is_found_before_any_row_is_staged(
    carry: Carry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RowStager, "stage", lambda *_: pytest.fail("a row was staged"))
    with pytest.raises(TerminalError, match="names of output columns: completion"):
        carry(lines(*LATE, *LATE, '{"completion":1}'), form="jsonl")


@pytest.mark.parametrize(
    ("template", "late", "told"),
    [
        ("{{ a-b }}", "a-b", "'a-b' is a column, and here it is an expression"),
        ("{{ true }}", "true", "'true' is a constant of Jinja and a column"),
        ("{% for n in [1] %}{{ loop.index }}{% endfor %}", "loop", "'loop' is the loop itself"),
    ],
)
@pytest.mark.parametrize("columns", [None, ["a"]])
def test_a_template_that_could_mean_a_late_key_is_refused(
    carry: Carry, tmp_path: Path, template: str, late: str, told: str, columns: list[str] | None
) -> None:
    given = lines(*['{"a":1,"b":2}'] * 1500, f'{{"{late}":1}}')
    with pytest.raises(TerminalError, match=told):
        carry(given, form="jsonl", prompt={"kind": "template", "template": template}, columns=columns)
    assert not (tmp_path / "job").exists()


def test_a_name_means_the_same_wherever_its_key_first_occurs(carry: Carry, tokenizer: Any) -> None:
    prompt = {"kind": "template", "template": "{{ row or 'none' }}"}
    late = carry(lines(*LATE, '{"row":"x"}'), form="jsonl", prompt=prompt)
    assert late.tokens[0] == tokenizer("none")["input_ids"]
    assert late.tokens[-1] == tokenizer("x")["input_ids"]


def test_keys_after_a_batch_of_bad_lines_are_columns_too(carry: Carry) -> None:
    prompt = {"kind": "template", "template": "{{ nowhere }}"}
    with pytest.raises(TerminalError, match="no such column: nowhere; columns: text"):
        carry(lines(*["{"] * BATCH_ROWS, '{"text":"x"}'), form="jsonl", prompt=prompt)


def test_a_named_type_is_that_of_the_column_and_of_prompts(carry: Carry, tokenizer: Any) -> None:
    texts = ['{"d":"2026-01-02","n":"7","t":5}', '{"d":"soon","n":1}', '{"n":0.5}', '{"d":null,"n":2,"t":[1]}']
    output = carry(
        lines(*texts),
        form="jsonl",
        schema={"d": "date32", "n": "int64", "t": "string", "never": "list<string>"},
        prompt={"kind": "template", "template": "{{ d.year if d else 0 }} {{ n + 1 }}"},
    )
    assert output.errors == [
        None,
        "column 'd': expected date32[day] (source.schema), got 'soon'",
        "column 'n': expected int64 (source.schema), got 0.5",
        None,
    ]
    assert [output.tokens[0], output.tokens[3]] == [tokenizer(text)["input_ids"] for text in ("2026 8", "0 3")]
    table = output.table
    assert [str(table.schema.field(name).type) for name in "dnt"] == ["date32[day]", "int64", "string"]
    assert table["n"].to_pylist() == [7, 1, None, 2]
    assert table["t"].to_pylist() == ["5", None, None, "[1]"]
    assert table["never"].to_pylist() == [None] * 4
    # A sink of JSON Lines has the rows as they were read.
    assert [row.get("n") for row in output.rows] == ["7", 1, 0.5, 2]


def test_named_columns_need_not_be_looked_for(carry: Carry) -> None:
    prompt = {"kind": "template", "template": "{{ text }}{{ never or '' }}"}
    output = carry(lines(*LATE), form="jsonl", schema={"never": "string"}, prompt=prompt)
    assert output.errors == [None] * BATCH_ROWS


def test_the_first_rows_are_those_of_both_sinks(carry: Carry) -> None:
    texts = [f'{{"n":{row}}}' for row in range(BATCH_ROWS + 10)]
    output = carry(lines(*texts), form="jsonl", limit=BATCH_ROWS + 3)
    assert output.column("n") == [list(range(BATCH_ROWS + 3))] * 2
