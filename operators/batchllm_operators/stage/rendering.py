"""Prompts from rows: a text, chat messages, or token ids, by the kind of the prompt part of the job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson

from batchllm_operators.stage.faults import invalid_row
from batchllm_operators.stage.field_text import fields_text
from batchllm_operators.stage.spec import (
    ChatPrompt,
    ColumnPrompt,
    FieldsPrompt,
    MessagesPrompt,
    PromptSpec,
    TemplatePrompt,
)
from batchllm_operators.stage.templates import RowTemplate

Record: TypeAlias = Mapping[str, Any]
Message: TypeAlias = dict[str, Any]
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A finished text; the tokenizer adds its special tokens (a beginning-of-sequence token, for many models)."""

    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the model's chat template, which writes all special tokens itself."""

    messages: list[Message]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, int32, taken as they are."""

    token_ids: npt.NDArray[np.int32]


Prompt: TypeAlias = TextPrompt | Conversation | TokenPrompt


@dataclass(frozen=True)
class PromptRenderer:
    """Makes the prompts of one job.

    Attributes:
        columns: field of the job -> columns it needs.
        render: the prompt of one row, given the numbers of its fields in their order where the kind has fields and
            their order is not as given; raises `RowFaultError`.
        is_chat: whether prompts go through the model's chat template.
    """

    columns: dict[str, frozenset[str]]
    render: Callable[[Record, Sequence[int] | None], Prompt]
    is_chat: bool


def prompt_renderer(spec: PromptSpec, vocab_size: int) -> PromptRenderer:
    """The renderer of a job's prompt part.

    Args:
        spec: the prompt part.
        vocab_size: tokens the model knows; only a prompt of kind `tokens` is checked against it.

    Raises:
        TerminalError: a template does not parse.
    """
    if isinstance(spec, ChatPrompt):
        return _chat(spec)
    if isinstance(spec, TemplatePrompt):
        return _template(spec)
    if isinstance(spec, FieldsPrompt):
        return _fields(spec)
    columns = {"prompt.column": frozenset([spec.column])}
    name = spec.column
    if isinstance(spec, ColumnPrompt):
        return PromptRenderer(columns, lambda record, _: _text(record, name), is_chat=False)
    if isinstance(spec, MessagesPrompt):
        return PromptRenderer(columns, lambda record, _: _messages(record, name), is_chat=True)
    return PromptRenderer(columns, lambda record, _: _tokens(record, name, vocab_size), is_chat=False)


def _chat(spec: ChatPrompt) -> PromptRenderer:
    user = RowTemplate(spec.user, "prompt.user")
    system = RowTemplate(spec.system, "prompt.system") if spec.system is not None else None

    def render(record: Record, _: Sequence[int] | None) -> Prompt:
        messages: list[Message] = []
        if system is not None:
            messages.append({"role": "system", "content": system.render(record)})
        messages.append({"role": "user", "content": _not_blank(user.render(record), "prompt.user")})
        return Conversation(messages)

    templates = [template for template in (system, user) if template is not None]
    return PromptRenderer({template.field_name: template.columns for template in templates}, render, is_chat=True)


def _template(spec: TemplatePrompt) -> PromptRenderer:
    template = RowTemplate(spec.template, "prompt.template")

    def render(record: Record, _: Sequence[int] | None) -> Prompt:
        return TextPrompt(_not_blank(template.render(record), "prompt.template"))

    return PromptRenderer({"prompt.template": template.columns}, render, is_chat=False)


def _fields(spec: FieldsPrompt) -> PromptRenderer:
    system: list[Message] = [] if spec.system is None else [{"role": "system", "content": spec.system}]

    def render(record: Record, order: Sequence[int] | None) -> Prompt:
        names = spec.columns if order is None else [spec.columns[number] for number in order]
        # A key that a JSON line lacks is null too.
        fields = [(name, record.get(name)) for name in names]
        if all(value is None for _, value in fields):
            raise invalid_row("prompt.columns: expected a value in at least one column, but all are null")
        content = f"{spec.question}\n\n{fields_text(spec.format, fields)}"
        return Conversation([*system, {"role": "user", "content": content}])

    return PromptRenderer({"prompt.columns": frozenset(spec.columns)}, render, is_chat=True)


def _text(record: Record, name: str) -> Prompt:
    value = record.get(name)
    if not isinstance(value, str):
        raise invalid_row(f"column {name!r}: expected text, got {_named(value)}")
    return TextPrompt(_not_blank(value, f"column {name!r}"))


def _messages(record: Record, name: str) -> Prompt:
    value = record.get(name)
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise invalid_row(f"column {name!r}: expected a list of messages as JSON: {error}") from error
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else _named(value)
        raise invalid_row(f"column {name!r}: expected a list of messages, got {got}")
    return Conversation([_message(message, f"column {name!r}, message {i}") for i, message in enumerate(value)])


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise invalid_row(f"{where}: expected {{role, content}}, got {_named(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise invalid_row(f"{where}: role: expected one of {', '.join(_ROLES)}, got {role!r}")
    if not isinstance(content, str):
        raise invalid_row(f"{where}: content: expected text, got {_named(content)}")
    # A column of structs has every field in every row, null where a message has none.
    return {key: item for key, item in message.items() if item is not None}


def _tokens(record: Record, name: str, vocab_size: int) -> Prompt:
    value = record.get(name)
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else _named(value)
        raise invalid_row(f"column {name!r}: expected a list of token ids, got {got}")
    for position, token in enumerate(value):
        if type(token) is not int:
            raise invalid_row(f"column {name!r}: token {position}: expected an integer, got {_named(token)}")
        if not 0 <= token < vocab_size:
            raise invalid_row(f"column {name!r}: token {position}: expected 0 to {vocab_size - 1}, got {token}")
    return TokenPrompt(np.array(value, dtype=np.int32))


def _not_blank(text: str, where: str) -> str:
    if not text or text.isspace():
        raise invalid_row(f"{where}: expected a prompt, got a blank text")
    return text


def _named(value: object) -> str:
    return "null" if value is None else type(value).__name__
