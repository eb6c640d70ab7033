"""Names in templates: which column each means, and which could mean a column and are refused."""

from __future__ import annotations

from typing import Any

import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.stage.faults import RowFaultError
from batchllm_operators.stage.templates import RowTemplate

ORDER = {"items": ["nail", "screw"], "keys": "two", "get": 1, "count": 2, "title": "Order", "format": "A4", "_id": "7f"}


def rendered(source: str, row: dict[str, Any]) -> str:
    return RowTemplate(source, "prompt.template", list(row)).render(row)


WORDS_OF_JINJA = [
    "range", "dict", "namespace", "joiner", "cycler", "lipsum", "self", "loop", "super", "caller", "varargs", "kwargs",
    "if", "and", "or", "for", "in", "is", "else", "block", "set", "environment", "context", "name", "items",
]  # fmt: skip


@pytest.mark.parametrize("name", WORDS_OF_JINJA)
def test_a_column_with_a_name_that_jinja_knows_is_the_column(name: str) -> None:
    row = {name: "the value", "other": "x"}
    assert rendered(f"{{{{ {name} }}}}", row) == "the value"
    assert rendered(f'{{{{ row["{name}"] }}}}', row) == "the value"
    assert RowTemplate(f"{{{{ {name} }}}}", "prompt.template", list(row)).columns == {name}


@pytest.mark.parametrize("name", ["true", "True", "false", "False", "none", "None"])
def test_a_constant_that_is_a_column_too_is_refused(name: str) -> None:
    row = {name: "the value", "x": None}
    with pytest.raises(TerminalError, match=rf'a constant of Jinja and a column: write row\["{name}"\] for the column'):
        rendered(f"{{{{ {name} }}}}", row)
    with pytest.raises(TerminalError, match="a constant of Jinja and a column"):
        rendered(f"{{% if not {name} %}}x{{% endif %}}", row)
    assert rendered(f'{{{{ row["{name}"] }}}}', row) == rendered(f"{{{{ row.{name} }}}}", row) == "the value"
    assert rendered("{{ x is none }}{{ x is not none }}", row) == "TrueFalse"
    other = name.lower() if name[0].isupper() else name.title()
    assert rendered(f"{{% if 1 == 1 and {other} is not defined %}}{{% endif %}}x", row) == "x"


def test_an_operator_that_is_a_column_is_told_how_to_be_written() -> None:
    with pytest.raises(TerminalError, match=r'not a valid template: .*; write row\["not"\] for column'):
        rendered("{{ not }}", {"not": "x"})
    assert rendered('{{ row["not"] }}', {"not": "x"}) == "x"


@pytest.mark.parametrize(
    "name",
    [
        "Review Text", "product-id", "a.b", "2024", "2nd", "größe (cm)", "价格?", "it's", 'so "so"', "a|upper", "x/y",
        " ", "back\\slash", "", "#", "a:b",
    ],
)  # fmt: skip
def test_a_column_whose_name_is_no_identifier_is_a_field_of_the_row(name: str) -> None:
    template = RowTemplate("{{ row[" + repr(name) + "] | upper }}", "prompt.user", ["x", name])
    assert template.columns == {name}
    assert template.render({"x": 1, name: "value"}) == "VALUE"


@pytest.mark.parametrize(
    ("source", "column"),
    [
        ("{{ product-id }}", "product-id"),
        ("{{ product - id }}", "product-id"),
        ("{% if product-id %}x{% endif %}", "product-id"),
        ("{{ (product-id) | upper }}", "product-id"),
        ("{{ user-agent-name }}", "user-agent-name"),
        ("{{ a.b }}", "a.b"),
        ("{{ a.b.c | upper }}", "a.b.c"),
        ("{{ user-agent.os }}", "user-agent.os"),
        ("{{ x/y }}", "x/y"),
        ("{{ a|upper }}", "a|upper"),
        ("{{ 2024-sales }}", "2024-sales"),
        ("{{ 2024 }}", "2024"),
        ("{{ a.0 }}", "a.0"),
        ("{{ Review Text }}", "Review Text"),
        ("{{ 2nd }}", "2nd"),
        ("{{ price? }}", "price?"),
    ],
)
def test_an_expression_that_is_spelled_like_a_column_is_refused_with_what_to_write(source: str, column: str) -> None:
    with pytest.raises(TerminalError) as caught:
        RowTemplate(source, "prompt.user", ["product", "id", "a", "x", "y", column])
    assert str(caught.value).startswith("prompt.user: ")
    assert f'write row["{column}"]' in str(caught.value)


def test_an_expression_over_columns_is_none_of_a_columns_name() -> None:
    assert rendered("{{ product - id }} {{ a.b }}", {"product": 5, "id": 2, "a": {"b": "c"}}) == "3 c"


def test_the_refusal_tells_how_to_write_the_operation_too() -> None:
    with pytest.raises(TerminalError, match=r'row\["a"\] - row\["b"\] for the operation'):
        RowTemplate("{{ a - b }}", "prompt.user", ["a", "b", "a-b"])
    assert rendered('{{ row["a"] - row["b"] }}', {"a": 3, "b": 1, "a-b": "x"}) == "2"


def test_what_is_called_is_the_function_and_what_is_not_is_the_column() -> None:
    row = {"range": "the range", "n": 2, "namespace": "x"}
    assert rendered("{% for i in range(n) %}{{ i }}{% endfor %} {{ range }}", row) == "01 the range"
    assert rendered("{% set ns = namespace(n=5) %}{% set ns.n = 6 %}{{ ns.n }} {{ namespace }}", row) == "6 x"


@pytest.mark.parametrize(
    ("source", "column"),
    [
        ("{% for i in n %}{{ loop.index }}{% endfor %}", "loop"),
        ("{% macro m() %}{{ kwargs }}{% endmacro %}{{ m() }}", "kwargs"),
        ("{% block b %}{{ super() }}{% endblock %}", "super"),
        ("{% for self in n %}{{ self }}{% endfor %}", "self"),
    ],
)
def test_a_word_with_a_meaning_of_its_own_where_it_stands_is_refused_where_it_is_a_column(
    source: str, column: str
) -> None:
    with pytest.raises(TerminalError, match=f"'{column}' is "):
        RowTemplate(source, "prompt.user", ["n", column])
    RowTemplate(source, "prompt.user", ["n"])


def test_two_names_that_python_takes_for_one_are_refused() -> None:
    with pytest.raises(TerminalError, match="one name to Jinja"):
        rendered("{{ ﬁ }}{{ fi }}", {"ﬁ": 1, "fi": 2})
    assert rendered('{{ row["ﬁ"] }}{{ fi }}', {"ﬁ": 1, "fi": 2}) == "12"


def test_a_column_named_row_is_the_column() -> None:
    row = {"row": {"x": "field"}, "x": "column", "a-b": 1}
    assert rendered("{{ row.x }} {{ row['x'] }} {{ x }}", row) == "field field column"
    with pytest.raises(TerminalError, match="not while a column is named row: rename that one"):
        rendered("{{ a-b }}", row)


@pytest.mark.parametrize(
    ("source", "needed"),
    [
        ('{{ row["a"] }}{{ b }}', {"a", "b"}),
        ("{{ row.a }}", {"a"}),
        ("{{ row[name] }}", {"a", "b", "name"}),
        ("{% for k, v in row.items() %}{{ k }}{% endfor %}", {"a", "b", "name"}),
        ("{{ row | tojson }}", {"a", "b", "name"}),
        ("{% for row in a %}{{ row.anything }}{% endfor %}", {"a"}),
        ("no column", set()),
        ('{{ row["nowhere"] }}', {"nowhere"}),
        ("{{ a[b] }}", {"a", "b"}),
    ],
)
def test_a_template_tells_which_columns_it_needs(source: str, needed: set[str]) -> None:
    assert RowTemplate(source, "prompt.user", ["a", "b", "name"]).columns == needed


def test_the_whole_row_has_all_columns_and_nulls_for_those_that_a_json_line_lacks() -> None:
    template = RowTemplate("{{ row | tojson }}", "prompt.user", ["a"])
    assert template.render({"a": 1}) == '{"a":1}'
    names = RowTemplate("{% for k in row | sort %}{{ k }} {% endfor %}", "prompt.user", ["b", "a"])
    assert names.render({"a": 1}) == "a b "


FIELDS = [
    ("{{ order.items }}", '["nail","screw"]'),
    ("{{ order.items[1] }}", "screw"),
    ("{{ order.keys }} {{ order.get }} {{ order.count }} {{ order.title }} {{ order.format }}", "two 1 2 Order A4"),
    ("{{ order['items'] | join(' ') }}", "nail screw"),
    ("{{ order._id }}", "7f"),
    # What is called is the method, whatever the fields are.
    ("{% for k, v in order.items() %}{{ k }} {% endfor %}", "items keys get count title format _id "),
    ("{{ order.keys() | first }}", "items"),
    ("{{ order.get('title') }} {{ order.get('nothing', 'x') }}", "Order x"),
    ("{{ order.title.upper() }} {{ order.title | upper }}", "ORDER ORDER"),
    ("{{ order.update is defined }} {{ order.update | default('none') }}", "False none"),
    ("{{ [order] | map(attribute='items') | first | join(',') }}", "nail,screw"),
    ("{{ [order] | selectattr('count', 'eq', 2) | list | length }}", "1"),
    ("{{ '{0.title} {0[format]}'.format(order) }}", "Order A4"),
    ("{{ order | attr('keys') }}", "two"),
]


@pytest.mark.parametrize(("source", "text"), FIELDS)
def test_a_field_wins_over_a_method_and_a_method_is_called(source: str, text: str) -> None:
    assert rendered(source, {"order": ORDER}) == text
    assert rendered(source.replace("order", "deep.order"), {"deep": {"order": ORDER}}) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ order.values }}", "{{ order['pop'] }}", "{{ text.upper }}", "{{ text['upper'] }}", "{{ tags.count }}",
        "{{ tags.index }}", "{{ number.bit_length }}", "{{ text ~ text.title }}", "{{ [text.title] }}",
        "{{ {'a': text.title} }}", "{{ '%s' % text.title }}", "{{ '%s' | format(text.title) }}",
        "{{ '{}'.format(text.title) }}", "{{ '{0.title}'.format(text) }}", "{{ text.title | string }}",
        "{{ text | attr('title') }}", "{{ [text.title] | join }}", "{{ text.title | upper }}",
        "{{ text.title | tojson }}", "{{ tags | map('upper') }}", "{{ tags | map('upper') ~ '' }}",
        "{{ '%s' % (tags | map('upper')) }}", "{{ '%s' | format(cycler('a')) }}", "{{ '{}'.format(cycler('a')) }}",
        "{{ [cycler('a')] }}", "{{ [cycler('a')] | string }}", "{{ cycler('a') | upper }}", "{{ joiner() }}x",
        "{{ namespace(a=1) }}", "{% for t in tags %}{{ loop }}{% endfor %}", "{% macro m() %}{% endmacro %}{{ m }}",
        "{{ text | pprint }}{{ tags.pop }}", "{% set x = order.values %}{{ x }}", "{{ tags | groupby('x') }}",
        "{{ dict }}", "{{ [range] }}", "{{ self ~ '' }}", "{{ order.values.x }}", "{{ order.nothing }}",
        "{{ {'a': cycler('a')} | xmlattr }}", "{% call m() %}{% endcall %}", "{{ tags | map('nothing') | list }}",
        "{{ tags | batch(2) }}", "{{ text.__class__ }}", "{{ cycler.__init__.__globals__ }}", "{{ ''.__class__() }}",
        "{{ order.items.__call__ }}", "{{ order.clear() }}", "{{ order.get.__self__ }}",
        "{{ '{0.__class__}'.format(text) }}", "{{ row.pop('text') }}", "{{ row.get }}", "{{ row }}{{ row.nothing }}",
        "{{ order.__class__ }}", "{{ text | attr('__class__') }}", "{{ tags.append('x') }}",
        "{{ order.pop('title') }}",
    ],
)  # fmt: skip
def test_what_is_no_data_is_never_printed(source: str) -> None:
    row = {"order": ORDER, "text": "some text", "tags": ["b", "a"], "number": 5}
    with pytest.raises((RowFaultError, TerminalError)) as caught:
        rendered(source, row)
    assert "object at 0x" not in str(caught.value)
    assert row["tags"] == ["b", "a"]


@pytest.mark.parametrize("source", ["{{ range }}", "{{ self }}", "{{ lipsum }}", "{{ none }}", "{% include 'x' %}"])
def test_what_can_never_be_a_prompt_is_refused_before_any_work(source: str) -> None:
    with pytest.raises(TerminalError, match=r"^prompt\.user: .* \(line 1\)$"):
        RowTemplate(source, "prompt.user", ["text"])
