"""Prompts from rows: a text, chat messages, or token ids, by the kind of the prompt part of the job."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from batchllm_operators.columns.arrays import Int32s
from batchllm_operators.specs.source import (
    ChatPrompt,
    ColumnPrompt,
    FieldsPrompt,
    MessagesPrompt,
    PromptSpec,
    TemplatePrompt,
)
from batchllm_operators.stage.faults import invalid_row
from batchllm_operators.stage.field_text import fields_text
from batchllm_operators.stage.messages import Message, conversation_of, named
from batchllm_operators.stage.special_tokens import SpecialTokens, texts_within
from batchllm_operators.stage.templates import RowTemplate
from batchllm_operators.stage.value_text import decoded

Record: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A finished text; the tokenizer adds its special tokens (a beginning-of-sequence token, for many models).

    Special tokens that belong to the job stand in it as markers (`SpecialTokens`).
    """

    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the model's chat template, which writes all special tokens itself.

    Attributes:
        messages: in their order; special tokens that belong to the job stand in them as markers (`SpecialTokens`).
        continues: whether the completion goes on where the last message ends.
    """

    messages: list[Message]
    continues: bool = False


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, int32, taken as they are."""

    token_ids: Int32s


Prompt: TypeAlias = TextPrompt | Conversation | TokenPrompt


def characters_of(prompt: Prompt) -> int:
    """Characters of a prompt's texts; of tokens none."""
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    return sum(map(len, texts_within(prompt.messages))) if isinstance(prompt, Conversation) else 0


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


def prompt_renderer(
    spec: PromptSpec,
    vocab_size: int,
    *,
    columns: Collection[str] | None = None,
    unites_keys: bool = False,
    special_tokens: SpecialTokens | None = None,
) -> PromptRenderer:
    """The renderer of a job's prompt part.

    Args:
        spec: the prompt part.
        vocab_size: tokens the model knows; only a prompt of kind `tokens` is checked against it.
        columns: of the input, for templates; None where they are not known.
        unites_keys: whether structs of the input have the keys of all rows, null where a row has none (Parquet).
        special_tokens: those of the tokenizer, which the job's own texts keep where those of rows do not.

    Raises:
        TerminalError: a template does not parse, or could mean a column and does not.
    """
    special = special_tokens or SpecialTokens()
    if isinstance(spec, ChatPrompt):
        return _chat(spec, columns, special)
    if isinstance(spec, TemplatePrompt):
        return _template(spec, columns, special)
    if isinstance(spec, FieldsPrompt):
        return _fields(spec, special)
    needed = {"prompt.column": frozenset([spec.column])}
    name = spec.column
    if isinstance(spec, ColumnPrompt):
        return PromptRenderer(needed, lambda record, _: _text(record, name), is_chat=False)
    if isinstance(spec, MessagesPrompt):
        continues = spec.continue_final_message

        def conversation(record: Record, _: Sequence[int] | None) -> Prompt:
            messages = conversation_of(record.get(name), name, unites_keys=unites_keys, continues=continues)
            return Conversation(messages, continues)

        return PromptRenderer(needed, conversation, is_chat=True)
    return PromptRenderer(needed, lambda record, _: _tokens(record, name, vocab_size), is_chat=False)


def _chat(spec: ChatPrompt, columns: Collection[str] | None, special: SpecialTokens) -> PromptRenderer:
    user = RowTemplate(spec.user, "prompt.user", columns, special)
    system = RowTemplate(spec.system, "prompt.system", columns, special) if spec.system is not None else None

    def render(record: Record, _: Sequence[int] | None) -> Prompt:
        messages: list[Message] = []
        if system is not None:
            messages.append({"role": "system", "content": system.render(record)})
        messages.append({"role": "user", "content": _not_blank(user.render(record), "prompt.user")})
        return Conversation(messages)

    templates = [template for template in (system, user) if template is not None]
    return PromptRenderer({template.field_name: template.columns for template in templates}, render, is_chat=True)


def _template(spec: TemplatePrompt, columns: Collection[str] | None, special: SpecialTokens) -> PromptRenderer:
    template = RowTemplate(spec.template, "prompt.template", columns, special)

    def render(record: Record, _: Sequence[int] | None) -> Prompt:
        return TextPrompt(_not_blank(template.render(record), "prompt.template"))

    return PromptRenderer({"prompt.template": template.columns}, render, is_chat=False)


def _fields(spec: FieldsPrompt, special: SpecialTokens) -> PromptRenderer:
    system: list[Message] = [] if spec.system is None else [{"role": "system", "content": special.mark(spec.system)}]
    question = special.mark(spec.question)

    def render(record: Record, order: Sequence[int] | None) -> Prompt:
        names = spec.columns if order is None else [spec.columns[number] for number in order]
        # A key that a JSON line lacks is null too.
        fields = [(name, record.get(name)) for name in names]
        if all(value is None for _, value in fields):
            raise invalid_row("prompt.columns: expected a value in at least one column, but all are null")
        content = f"{question}\n\n{fields_text(spec.format, fields)}"
        return Conversation([*system, {"role": "user", "content": content}])

    return PromptRenderer({"prompt.columns": frozenset(spec.columns)}, render, is_chat=True)


def _text(record: Record, name: str) -> Prompt:
    value = decoded(f"column {name!r}", record.get(name))
    if not isinstance(value, str):
        raise invalid_row(f"column {name!r}: expected text, got {named(value)}")
    return TextPrompt(_not_blank(value, f"column {name!r}"))


def _tokens(record: Record, name: str, vocab_size: int) -> Prompt:
    value = record.get(name)
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else named(value)
        raise invalid_row(f"column {name!r}: expected a list of token ids, got {got}")
    for position, token in enumerate(value):
        if type(token) is not int:
            raise invalid_row(f"column {name!r}: token {position}: expected an integer, got {named(token)}")
        if not 0 <= token < vocab_size:
            raise invalid_row(f"column {name!r}: token {position}: expected 0 to {vocab_size - 1}, got {token}")
    return TokenPrompt(np.array(value, dtype=np.int32))


def _not_blank(text: str, where: str) -> str:
    if not text or text.isspace():
        raise invalid_row(f"{where}: expected a prompt, got a blank text")
    return text
