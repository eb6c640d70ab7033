"""Templates that would take a night or all memory for one row: the row gets an error, and soon."""

from __future__ import annotations

import time
from typing import Any

import pytest

from batchllm_operators.stage.faults import RowFaultError
from batchllm_operators.stage.template_limits import MOST_SECONDS, MOST_STEPS, RenderLimits, TemplateLimitError
from batchllm_operators.stage.templates import RowTemplate

LOOP = "{% for i in range(100000) %}"
DOUBLED = "{% set ns = namespace(v=START) %}{% for i in range(60) %}{% set ns.v = NEXT %}{% endfor %}{{ ns.v }}"


def doubled(start: str, following: str) -> str:
    return DOUBLED.replace("START", start).replace("NEXT", following)


@pytest.mark.parametrize(
    "source",
    [
        LOOP + LOOP + "x{% endfor %}{% endfor %}",
        LOOP + LOOP + LOOP + "{% if false %}x{% endif %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ 'x' * 10**9 }}",
        "{{ ['x'] * 10**9 }}",
        "{{ (10 ** 9) ** (10 ** 9) }}",
        doubled("7", "ns.v * ns.v"),
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10**9) }}",
        "{{ 'x'.ljust(10**9) }}",
        "{{ text.center(10**9) }}",
        "{{ ('\\t' * 1000).expandtabs(10**9) }}",
        "{{ 'x'|center(10**9) }}",
        "{{ ('x\\n' * 100000)|indent(100000) }}",
        "{{ [1]|batch(10**9, 'x')|list }}",
        "{{ lipsum(n=10**6) }}",
        "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
        "{{ (['x' * 1000000] * 1000)|join }}",
        "{{ ''.join(['x' * 1000000] * 1000) }}",
        doubled("'x'", "ns.v ~ ns.v"),
        doubled("'x'", "ns.v + ns.v"),
        doubled("['x']", "ns.v + ns.v"),
        doubled("['x']", "[ns.v, ns.v]"),
        doubled("{'x': 1}", "{'a': ns.v, 'b': ns.v}").replace("{{ ns.v }}", "{{ ns.v|tojson }}"),
        "{% set ns = namespace(v='x' * 9000000) %}{% for i in range(99) %}{% set t = ns.v ~ i %}{% endfor %}",
    ],
)
def test_a_template_that_takes_too_much_is_the_error_of_its_row(source: str) -> None:
    template = RowTemplate(source, "prompt.user", ["text"])
    began = time.process_time()
    with pytest.raises(
        RowFaultError, match=r"prompt\.user: (it (takes|makes|writes) |RecursionError|OverflowError)"
    ) as caught:
        template.render({"text": "x"})
    assert caught.value.error.code == "template_error"
    assert time.process_time() - began < 2 * MOST_SECONDS


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for n in items %}{{ n }}{{ ',' if not loop.last }}{% endfor %}", ",".join(map(str, range(20_000)))),
        ("{% for k, v in fields.items() recursive %}{{ k }}={{ v }};{% endfor %}", "a=1;b=2;"),
        (
            "{{ items|length }} {{ items[:3]|join('-') }} {{ 3 * 4 + 2 ** 10 }} {{ 'ab' * 3 }}",
            "20000 0-1-2 1036 ababab",
        ),
        ("{{ '%05d' % 42 }} {{ '{:>5}'.format(7) }} {{ text.ljust(6) }}|", "00042     7 row   |"),
        ("{{ text ~ '-' ~ text }} {{ fields|tojson }}", 'row-row {"a":1,"b":2}'),
    ],
)
def test_what_templates_do_with_rows_stays(source: str, expected: str) -> None:
    row: dict[str, Any] = {"items": list(range(20_000)), "fields": {"a": 1, "b": 2}, "text": "row"}
    template = RowTemplate(source, "prompt.user", list(row))
    assert [template.render(row), template.render(row)] == [expected, expected]


def test_every_row_is_counted_for_itself() -> None:
    template = RowTemplate("{% for n in range(60000) %}{% endfor %}{{ text }}", "prompt.user", ["text"])
    assert [template.render({"text": str(row)}) for row in range(8)] == [str(row) for row in range(8)]


def test_the_time_of_a_row_is_limited_whatever_it_does() -> None:
    now = 0.0
    limits = RenderLimits(lambda: now)
    limits.step()
    now = MOST_SECONDS + 1
    with pytest.raises(TemplateLimitError, match="more than 10 s"):
        for _ in range(100):
            limits.step()
    limits.begin()
    for _ in range(MOST_STEPS):
        limits.step()
    with pytest.raises(TemplateLimitError, match="more than 200,000 turns"):
        limits.step()
