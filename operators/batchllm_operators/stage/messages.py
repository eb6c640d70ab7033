"""Chat messages as a row holds them, on their way to the model's chat template.

The shape is OpenAI's, {role, content}, with what people's tables make of it: JSON text or structs, content as a list of
text parts, tool calls without content. Other vendors' names of roles are taken where they say just the same.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import orjson

from batchllm_operators.stage.faults import invalid_row
from batchllm_operators.stage.value_text import decoded, json_value

Message: TypeAlias = dict[str, Any]

_ROLES = ("system", "developer", "user", "assistant", "tool")
# Gemini's, Llama's and OpenAI's older names.
_SAME_ROLES = {"model": "assistant", "ipython": "tool", "function": "tool"}
# Names that say less surely what they are: told, not taken.
_LIKELY_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant", "chatbot": "assistant"}
# vLLM's separator, for chat templates that take a text.
_BETWEEN_PARTS = "\n"


def conversation_of(value: Any, column: str, *, unites_keys: bool, continues: bool) -> list[Message]:
    """The messages of a row, for the chat template: content is always a text, a tool call's arguments an object.

    Args:
        value: of the column: a list of messages, or the same as JSON text.
        column: its name, for messages of errors.
        unites_keys: whether structs of the input have the keys of all rows, null where a row has none (Parquet).
        continues: whether the last message, the assistant's, is to be continued.

    Raises:
        RowFaultError: no conversation; names the message, what was expected and got, and what to write for shapes that
            other programs use.
    """
    where = f"column {column!r}"
    value = decoded(where, value)
    if isinstance(value, str):
        value, unites_keys = _parsed(value, f"{where}: expected a list of messages as JSON"), False
    if not isinstance(value, list) or not value:
        raise invalid_row(f"{where}: expected a list of messages, got {_described(value)}")
    if unites_keys:
        value = _without_nulls(value)
    messages = [_message(message, f"{where}, message {place}") for place, message in enumerate(value)]
    last = messages[-1]
    if continues and (last["role"] != "assistant" or not last["content"].strip()):
        got = f"a message of role {last['role']!r}" if last["role"] != "assistant" else "one without text"
        raise invalid_row(
            f"{where}: prompt.continue_final_message expects a last message of role 'assistant' with text, got {got}"
        )
    if not continues and last["role"] == "assistant":
        raise invalid_row(
            f"{where}: the last message is the assistant's, which leaves nothing to answer: set"
            " prompt.continue_final_message: true to continue it"
        )
    return messages


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise invalid_row(f"{where}: expected {{role, content}}, got {named(message)}")
    if "role" not in message and {"from", "value"} <= message.keys():
        raise invalid_row(
            f"{where}: expected {{role, content}}, got ShareGPT's {{from, value}}: write role for from ('user' for"
            " 'human', 'assistant' for 'gpt') and content for value"
        )
    # A column of structs has every field in every row, null where a message has none.
    message = {key: item for key, item in message.items() if item is not None}
    role = _role(message.get("role"), where)
    calls = message.pop("tool_calls", None)
    if calls:
        calls = [_tool_call(call, f"{where}, tool call {place}") for place, call in enumerate(_calls(calls, where))]
    content = message.get("content")
    if content is None and "function_call" in message:
        raise invalid_row(f"{where}: expected tool_calls, got OpenAI's older function_call: write [{{function: ...}}]")
    if content is None and calls and role == "assistant":
        content = ""  # as vLLM has it: chat templates join texts
    message |= {"role": role, "content": _content(content, f"{where}: content")}
    return message | {"tool_calls": calls} if calls else message


def _role(role: object, where: str) -> str:
    if isinstance(role, str) and role in _ROLES:
        return role
    if isinstance(role, str) and role in _SAME_ROLES:
        return _SAME_ROLES[role]
    plain = role.strip().lower() if isinstance(role, str) else ""
    meant = _LIKELY_ROLES.get(plain) or _SAME_ROLES.get(plain) or (plain if plain in _ROLES else None)
    hint = "" if meant is None else f": write {meant!r}"
    raise invalid_row(f"{where}: role: expected one of {', '.join(_ROLES)}, got {role!r}{hint}")


def _content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid_row(f"{where}: expected text, got {named(content)}")
    if not content:
        raise invalid_row(f"{where}: expected text, got an empty list")
    return _BETWEEN_PARTS.join(_part(part, f"{where}: expected text", place) for place, part in enumerate(content))


def _part(part: object, expected: str, place: int) -> str:
    if not isinstance(part, dict):
        raise invalid_row(f"{expected}, got list, whose part {place} is {named(part)}: write {{type: text, text: ...}}")
    if part.get("type") != "text":
        raise invalid_row(
            f"{expected}, got a part of type {part.get('type')!r} (part {place}): only texts are answered"
        )
    if not isinstance(part.get("text"), str):
        raise invalid_row(f"{expected}, got {named(part.get('text'))} in part {place}")
    text: str = part["text"]
    return text


def _calls(calls: object, where: str) -> list[Any]:
    if isinstance(calls, list):
        return calls
    raise invalid_row(f"{where}: tool_calls: expected a list, got {named(calls)}")


def _tool_call(call: object, where: str) -> dict[str, Any]:
    """The call, with its arguments as an object: so chat templates expect them, where OpenAI has JSON text."""
    if not isinstance(call, dict):
        raise invalid_row(f"{where}: expected {{type, function}}, got {named(call)}")
    call = {key: item for key, item in call.items() if item is not None}
    if "function" in call:
        return call | {"function": _tool_call(call["function"], f"{where}: function")}
    if not isinstance(call.get("name"), str):
        raise invalid_row(f"{where}: name: expected text, got {named(call.get('name'))}")
    arguments = call.get("arguments", "")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{where}: arguments: expected a JSON object") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise invalid_row(f"{where}: arguments: expected an object, got {named(arguments)}")
    return call | {"arguments": json_value(arguments)}


def _without_nulls(value: Any) -> Any:
    """The value without the keys that only other rows' structs have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parsed(text: str, expected: str) -> Any:
    try:
        return orjson.loads(text)
    except (orjson.JSONDecodeError, UnicodeEncodeError) as error:
        raise invalid_row(f"{expected}: {error}") from error


def _described(value: object) -> str:
    for key in ("messages", "conversations"):
        if isinstance(value, dict) and isinstance(value.get(key), list):
            return f"an object that has them under {key!r}: make that list the column"
    return "an empty list" if value == [] else named(value)


def named(value: object) -> str:
    """What a value is, for a message: its type, or null."""
    return "null" if value is None else type(value).__name__
