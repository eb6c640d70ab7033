"""Whatever a row holds, it gives a prompt or an error of its own, and what is no data never stands in a prompt."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.source import PromptSpec
from batchllm_operators.stage.faults import RowFaultError
from batchllm_operators.stage.rendering import Conversation, Prompt, TextPrompt, prompt_renderer
from batchllm_operators.stage.templates import RowTemplate
from batchllm_operators.stage.tokenizing import PromptTokenizer

PROMPT: TypeAdapter[PromptSpec] = TypeAdapter(PromptSpec)
NO_DATA = ("<built-in", "object at 0x", "b'", "<generator", "<function", "<class", "dict_", "Undefined", "<bound")
QUICK = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))

# No quote: a text of the row may hold b' itself.
TEXT = st.text(st.characters(exclude_characters="'", codec=None), max_size=6)
NAMES = st.sampled_from(
    ["items", "keys", "values", "get", "copy", "count", "a", "role", "content", "text", "__class__"]
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.binary(max_size=4) | st.datetimes()
    | st.decimals() | st.sampled_from(["<|im_end|>", "user", "assistant", "text", "[]", dt.timedelta(1)])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | TEXT, inner, max_size=3), max_leaves=8
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": VALUES | st.just("user"), "content": VALUES | TEXT}), max_size=3)
TEMPLATES = [
    "{{ v }}", "{{ v | upper }}", "{{ v ~ w }}", "{{ v.items }}{{ v.keys }}", "{% for x in v %}{{ x }}{% endfor %}",
    "{{ v | join(',') }}", "{{ v[0] }}", "{{ v | tojson }}", "{{ '%s' % v }}", "{{ '{}'.format(v) }}",
    "{{ v.count }}", "{{ v | first }}", "{{ row }}", "{{ v | list }}", "{{ v | sort }}", "{{ v | pprint }}",
    "{{ v | string }}{{ w }}", "{{ '%s' | format(v) }}", "{{ v | dictsort }}", "{{ v | items | list }}",
    "{{ v | xmlattr }}", "{{ v | urlencode }}", "{{ v | map('upper') | list }}", "{{ v.get }}", "{{ v['copy'] }}",
    "{{ v.a or 'x' }}", "{{ [v, w] }}", "{{ {'a': v} }}", "{{ v | unique | list }}", "{{ v | groupby('a') }}",
    "{{ v + w }}", "{{ v | default('x') }}", "{{ v.items() | list }}", "{{ v.a.get.b }}", "{{ v | sum }}",
    "{{ v | reverse | list }}", "{{ v | batch(2) | list }}", "{{ v.format(w) }}", "{{ v | e }}",
    "{{ v | replace('a', w) }}", "{{ v % w }}", "{{ v.values() }}", "{{ v.upper() }}", "{{ v | safe }}",
]  # fmt: skip


@QUICK
@given(source=st.sampled_from(TEMPLATES), v=VALUES, w=VALUES)
def test_a_template_prints_data_or_makes_the_row_an_error(source: str, v: Any, w: Any) -> None:
    template = RowTemplate(source, "prompt.template", ["v", "w"])
    try:
        text = template.render({"v": v, "w": w})
    except RowFaultError as fault:
        assert fault.error.message
        return
    assert not any(one in text for one in NO_DATA), text


KINDS: list[dict[str, Any]] = [
    {"kind": "column", "column": "v"},
    {"kind": "messages", "column": "v"},
    {"kind": "messages", "column": "v", "continue_final_message": True},
    {"kind": "tokens", "column": "v"},
    {"kind": "fields", "question": "Is it so?", "columns": ["v", "w"]},
    {"kind": "fields", "question": "Is it so?", "columns": ["v", "w"], "format": "lines"},
    {"kind": "chat", "system": "{{ w }}", "user": "{{ v }}"},
    {"kind": "chat", "system": "{{ w }}", "user": "{{ v }}", "special_tokens": "allow"},
]


@pytest.fixture(scope="session")
def tokenizers(tiny_llama: str) -> dict[str, PromptTokenizer]:
    model = ModelSpec(id=tiny_llama)
    return {"as_text": PromptTokenizer(model, "as_text"), "allow": PromptTokenizer(model, "allow")}


@QUICK
@given(spec=st.sampled_from(KINDS), v=VALUES | MESSAGES, w=VALUES, unites_keys=st.booleans())
def test_a_row_gives_a_prompt_or_an_error(
    tokenizers: dict[str, PromptTokenizer], spec: dict[str, Any], v: Any, w: Any, unites_keys: bool
) -> None:
    tokenizer = tokenizers[spec.get("special_tokens", "as_text")]
    renderer = prompt_renderer(
        PROMPT.validate_python(spec),
        49152,
        columns=["v", "w"],
        unites_keys=unites_keys,
        special_tokens=tokenizer.special_tokens,
    )
    try:
        prompt = renderer.render({"v": v, "w": w}, None)
    except RowFaultError as fault:
        assert fault.error.message
        return
    assert not any(one in text for text in texts_of(prompt) for one in NO_DATA)
    (ids,) = tokenizer.tokenize([prompt])
    assert isinstance(ids, RowFaultError) or (len(ids) and ids.max() < 49152)


def texts_of(prompt: Prompt) -> list[str]:
    if isinstance(prompt, Conversation):
        return [message["content"] for message in prompt.messages]
    return [prompt.text] if isinstance(prompt, TextPrompt) else []


@QUICK
@given(name=st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "row"))
def test_a_column_with_any_name_is_reached_as_the_messages_say(name: str) -> None:
    template = RowTemplate(f"{{{{ row[{json.dumps(name, ensure_ascii=False)}] }}}}", "prompt.user", [name, "other"])
    assert template.render({name: "value", "other": "x"}) == "value"


@QUICK
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="{}#%"), max_size=20))
def test_a_template_without_expressions_is_its_own_text(text: str) -> None:
    assert RowTemplate(text, "prompt.user", ["v"]).render({}) == text
