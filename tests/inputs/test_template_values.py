"""Values in templates and in `fields`: the text of each, and which are the fault of their row."""

from __future__ import annotations

import datetime as dt
import math
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from batchllm_operators.errors import RowErrorCode
from batchllm_operators.stage.faults import RowFaultError
from batchllm_operators.stage.field_text import fields_text
from batchllm_operators.stage.templates import RowTemplate

ZONE = dt.timezone(dt.timedelta(hours=2))

# value, its text in a template and in `lines`, its text within JSON
VALUES = [
    ("text", "text", '"text"'),
    ('so "so"\n', 'so "so"\n', '"so \\"so\\"\\n"'),
    (5, "5", "5"),
    (2**80, str(2**80), str(2**80)),
    (-0.0, "-0.0", "-0.0"),
    (0.1, "0.1", "0.1"),
    (1e16, "1e+16", "1e+16"),
    (math.nan, "nan", "null"),
    (math.inf, "inf", "null"),
    (Decimal("9.90"), "9.90", '"9.90"'),
    (Decimal("12345678901234567890.123456789"), "12345678901234567890.123456789", '"12345678901234567890.123456789"'),
    (dt.date(2026, 1, 2), "2026-01-02", '"2026-01-02"'),
    (dt.datetime(2026, 1, 2, 3, 4, 5), "2026-01-02 03:04:05", '"2026-01-02 03:04:05"'),
    (dt.datetime(2026, 1, 2, 3, 4, 5, 6), "2026-01-02 03:04:05.000006", '"2026-01-02 03:04:05.000006"'),
    (dt.datetime(1, 1, 1, tzinfo=ZONE), "0001-01-01 00:00:00+02:00", '"0001-01-01 00:00:00+02:00"'),
    (dt.time(3, 4), "03:04:00", '"03:04:00"'),
    (dt.timedelta(days=1, seconds=2), "1 day, 0:00:02", '"1 day, 0:00:02"'),
    (UUID(int=5), "00000000-0000-0000-0000-000000000005", '"00000000-0000-0000-0000-000000000005"'),
    (["a", 1, None], '["a",1,null]', '["a",1,null]'),
    ([], "[]", "[]"),
    ({"b": 1, "a": {"c": None}}, '{"b":1,"a":{"c":null}}', '{"b":1,"a":{"c":null}}'),
    ({"at": dt.datetime(2026, 1, 2), "d": [Decimal("1.0")]},) + ('{"at":"2026-01-02 00:00:00","d":["1.0"]}',) * 2,
    ({1: "int", dt.date(2026, 1, 2): "date"},) + ('{"1":"int","2026-01-02":"date"}',) * 2,
    ([("key", "value")],) + ('[["key","value"]]',) * 2,
    (b"caf\xc3\xa9", "café", '"café"'),
    ({"raw": [b"x"]},) + ('{"raw":["x"]}',) * 2,
    ("\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "😀", '"😀"'),
    ("nul\x00", "nul\x00", '"nul\\u0000"'),
]


@pytest.mark.parametrize(("value", "text", "json"), VALUES, ids=[repr(one[0])[:40] for one in VALUES])
def test_a_value_has_one_text_everywhere(value: Any, text: str, json: str) -> None:
    row = {"v": value}
    for source in ("{{ v }}", "{{ v ~ '' }}", "{{ v | string }}", "{{ [v] | join }}", "{{ '%s' % (v,) }}"):
        assert RowTemplate(source, "prompt.user", ["v"]).render(row) == text, source
    assert RowTemplate("{{ v | tojson }}", "prompt.user", ["v"]).render(row) == json
    assert RowTemplate("{{ s }}", "prompt.user", ["s"]).render({"s": [value]}) == f"[{json}]"
    assert fields_text("lines", [("v", value), ("w", 1)]) == f"v: {text}\nw: 1"
    assert fields_text("json", [("v", value)]) == f'{{"v": {json}}}'


def test_booleans_are_pythons_in_templates_and_jsons_in_json() -> None:
    assert RowTemplate("{{ v }} {{ [v] }}", "prompt.user", ["v"]).render({"v": True}) == "True [true]"
    assert fields_text("lines", [("v", True)]) == "v: true"


def test_values_keep_their_methods_and_arithmetic() -> None:
    row = {"at": dt.datetime(2026, 1, 2, 3), "price": Decimal("9.90"), "tags": ["b", "a"], "day": dt.date(2026, 1, 2)}
    source = (
        "{{ at.year }} {{ at.strftime('%H') }} {{ price * 2 }} {{ tags | sort }} {{ day.isoformat() }} {{ tags[:1] }}"
    )
    assert RowTemplate(source, "prompt.user", list(row)).render(row) == '2026 03 19.80 ["a","b"] 2026-01-02 ["b"]'


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"ab\xff", "column 'v': expected text in UTF-8, got byte 0xff at position 2"),
        ({"s": [b"\x80"]}, "column 'v', field 's', item 0: expected text in UTF-8, got byte 0x80 at position 0"),
    ],
)
def test_bytes_that_are_no_text_are_the_fault_of_their_row(value: Any, message: str) -> None:
    for source in ("{{ v }}", "{{ v | length }}", "{{ row.v }}"):
        with pytest.raises(RowFaultError) as caught:
            RowTemplate(source, "prompt.user", ["v"]).render({"v": value})
        assert (caught.value.error.code, caught.value.error.message) == (RowErrorCode.INVALID_ROW, message)
    for form in ("json", "lines"):
        with pytest.raises(RowFaultError, match="expected text in UTF-8"):
            fields_text(form, [("v", value)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% if notes %}x{% else %}none{% endif %}", "none"),
        ("{{ notes or '' }}!", "!"),
        ("{{ notes | default('none') }}", "none"),
        ("{{ 'none' if notes is none else notes }}", "none"),
        ("{{ order.note or 'none' }}", "none"),
        ("{{ order.note is none }}", "True"),
        ("{{ tags | reject('none') | join(',') }}", "a,b"),
        ("{{ tags | tojson }}", '["a",null,"b"]'),
        ("{{ order }}", '{"note":null}'),
    ],
)
def test_a_null_may_be_tested_and_given_a_default(source: str, text: str) -> None:
    """A column that a JSON line lacks is null as well."""
    row = {"order": {"note": None}, "tags": ["a", None, "b"]}
    template = RowTemplate(source, "prompt.user", ["notes", "order", "tags"])
    assert template.render(row) == template.render(row | {"notes": None}) == text


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{{ notes }}", "column 'notes' is null"),
        ("{{ notes | trim }}", "column 'notes' is null"),
        ("{{ text ~ notes }}", "column 'notes' is null"),
        ("{{ row['notes'] }}", "column 'notes' is null"),
        ("{{ '%s' % notes }}", "column 'notes' is null"),
        ("{{ '{}'.format(notes) }}", "column 'notes' is null"),
        ("{{ '%s' | format(notes) }}", "column 'notes' is null"),
        ("{{ notes | string }}", "column 'notes' is null"),
        ("{% for n in notes %}{% endfor %}", "column 'notes' is null"),
        ("{{ order.note }}", "a value within a column is null"),
        ("{{ order.note | upper }}", "a value within a column is null"),
        ("{{ order.get('nothing') }}", "a value within a column is null"),
        ("{{ [order.note] | join }}", "a value within a column is null"),
    ],
)
def test_a_null_that_is_printed_is_the_fault_of_its_row(source: str, what: str) -> None:
    row = {"notes": None, "text": "x", "order": {"note": None}}
    with pytest.raises(RowFaultError) as caught:
        RowTemplate(source, "prompt.user", list(row)).render(row)
    assert caught.value.error.message == f"prompt.user: expected a value to print, but {what}"
    assert caught.value.error.code == RowErrorCode.INVALID_ROW


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("a\n", "a\n"),
        ("a\n\n{{ v }}\n", "a\n\nx\n"),
        ("a\r\nb\n{{ v }}\r\n", "a\r\nb\nx\r\n"),
        ("\r{{ v }}\r", "\rx\r"),
        ("{% if v %}\r\ny{% endif %}\r\n", "\r\ny\r\n"),
        ("{%- if v -%}\r\ny{% endif %}", "y"),
        ("{{ 'a\r\nb' }}", "a\r\nb"),
        ("{{ v\r\n | upper }}", "X"),
        ("\r{{ '\\x1c\\u2028\\r' }}", "\r\x1c\u2028\r"),
        ("{# note\r\n #}\ta\x1c\x85 b\u2028 \n", "\ta\x1c\x85 b\u2028 \n"),
        ("{% raw %}{{ v }}\r\n{% endraw %}", "{{ v }}\r\n"),
        ("{% set y %}\r\n{% endset %}[{{ y }}]", "[\r\n]"),
    ],
)
def test_what_a_template_writes_stays_to_the_byte(source: str, text: str) -> None:
    assert RowTemplate(source, "prompt.user", ["v"]).render({"v": "x"}) == text


def test_a_row_keeps_its_line_breaks_and_white_space() -> None:
    text = "\r\n\x1c\t a \u2028\x85\r"
    assert RowTemplate("{{ v }}", "prompt.user", ["v"]).render({"v": text}) == text


def test_a_number_with_more_digits_than_python_writes_is_the_fault_of_its_row() -> None:
    with pytest.raises(RowFaultError):
        RowTemplate("{{ v }}", "prompt.user", ["v"]).render({"v": 10**5000})
    for form in ("json", "lines"):
        with pytest.raises(RowFaultError, match="column 'v': expected a value that JSON can write, got int"):
            fields_text(form, [("v", 10**5000)])  # type: ignore[arg-type]


def test_a_value_that_is_nested_too_deeply_is_the_fault_of_its_row() -> None:
    value: Any = "x"
    for _ in range(5000):
        value = [value]
    with pytest.raises(RowFaultError):
        RowTemplate("{{ v }}", "prompt.user", ["v"]).render({"v": value})
