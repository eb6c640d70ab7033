"""Chat messages in the shapes that tables hold them: what goes to the chat template, and what is the row's fault."""

from __future__ import annotations

import datetime as dt
from typing import Any

import orjson
import pytest

from batchllm_operators.stage.faults import RowFaultError
from batchllm_operators.stage.messages import conversation_of

USER = {"role": "user", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "find", "arguments": {"city": "Rome"}}}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "sunny"}


def conversation(value: Any, *, unites_keys: bool = False, continues: bool = False) -> list[dict[str, Any]]:
    return conversation_of(value, "chat", unites_keys=unites_keys, continues=continues)


def calling(**function: Any) -> list[dict[str, Any]]:
    return [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]},
        RESULT,
    ]


def called(**function: Any) -> list[dict[str, Any]]:
    return [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        RESULT,
    ]


TAKEN = [
    ([USER], [USER]),
    ([{"role": "developer", "content": "Be brief."}, USER], [{"role": "developer", "content": "Be brief."}, USER]),
    ([{"role": "user", "content": ""}], [{"role": "user", "content": ""}]),
    ([USER | {"name": None, "weight": 1}], [USER | {"weight": 1}]),
    ([{"role": "user", "content": b"caf\xc3\xa9"}], [{"role": "user", "content": "café"}]),
    # Other vendors' roles.
    ([USER, {"role": "model", "content": "Hello"}, USER], [USER, {"role": "assistant", "content": "Hello"}, USER]),
    ([USER, RESULT | {"role": "ipython"}], [USER, RESULT]),
    ([USER, RESULT | {"role": "function"}], [USER, RESULT]),
    # Content in parts.
    ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], [USER]),
    (
        [{"role": "user", "content": [{"type": "text", "text": "a", "url": None}, {"type": "text", "text": "b"}]}],
        [{"role": "user", "content": "a\nb"}],
    ),
    # Tool calls: without content, with arguments as an object or as JSON text.
    (calling(name="find", arguments={"city": "Rome"}), called(name="find", arguments={"city": "Rome"})),
    (calling(name="find", arguments='{"city": "Rome"}'), called(name="find", arguments={"city": "Rome"})),
    (calling(name="find", arguments=""), called(name="find", arguments={})),
    (calling(name="find", arguments=None), called(name="find", arguments={})),
    (calling(name="find"), called(name="find", arguments={})),
    (
        calling(name="find", arguments={"at": dt.datetime(2026, 1, 2), "q": None}),
        called(name="find", arguments={"at": "2026-01-02 00:00:00", "q": None}),
    ),
    (
        [USER, {"role": "assistant", "tool_calls": [{"name": "find", "arguments": {}}]}, RESULT],
        [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "find", "arguments": {}}]}, RESULT],
    ),
    (
        [USER, {"role": "assistant", "content": "Hello", "tool_calls": []}, USER],
        [USER, {"role": "assistant", "content": "Hello"}, USER],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("value", "messages"), TAKEN)
def test_messages_in_the_shapes_of_tables_are_taken(value: Any, messages: list[dict[str, Any]]) -> None:
    assert conversation(value) == messages
    assert conversation([dict(reversed(one.items())) for one in value]) == messages


@pytest.mark.parametrize(
    "value", [one for one, _ in TAKEN if b"caf" not in repr(one).encode() and "datetime" not in repr(one)]
)
def test_the_same_messages_as_json_text_are_taken(value: Any) -> None:
    assert conversation(orjson.dumps(value).decode()) == conversation(orjson.dumps(value)) == conversation(value)


def test_keys_that_only_other_rows_have_are_absent() -> None:
    """Parquet's structs have the keys of all rows, JSON's only their own."""
    value = calling(name="find", arguments={"city": "Rome", "query": None, "area": {"km": 1, "miles": None}})
    bare = called(name="find", arguments={"city": "Rome", "area": {"km": 1}})
    assert conversation(value, unites_keys=True) == bare
    assert conversation(value)[1]["tool_calls"][0]["function"]["arguments"]["query"] is None
    # JSON text within Parquet has just its own keys.
    assert conversation(orjson.dumps(value).decode(), unites_keys=True) == conversation(value)


def test_a_last_message_of_the_assistant_is_continued_where_the_job_says_so() -> None:
    value = [USER, {"role": "assistant", "content": "Sure, "}]
    assert conversation(value, continues=True) == value
    with pytest.raises(RowFaultError, match=r"leaves nothing to answer: set prompt\.continue_final_message: true"):
        conversation(value)


REFUSED = [
    (None, "expected a list of messages, got null"),
    ("Hi", "expected a list of messages as JSON"),
    ('"Hi"', "expected a list of messages, got str"),
    ([], "got an empty list"),
    (5, "got int"),
    ({"messages": [USER], "model": "x"}, "got an object that has them under 'messages': make that list the column"),
    ('{"conversations": [{"from": "human", "value": "x"}]}', "under 'conversations'"),
    ([USER, "Hi"], "message 1: expected {role, content}, got str"),
    ([{"from": "human", "value": "Hi"}], "got ShareGPT's {from, value}: write role for from ('user' for 'human'"),
    ([{"content": "Hi"}], "message 0: role: expected one of system, developer, user, assistant, tool, got None"),
    ([{"role": "robot", "content": "Hi"}], "got 'robot'"),
    ([{"role": "User", "content": "Hi"}], "got 'User': write 'user'"),
    ([{"role": "human", "content": "Hi"}], "got 'human': write 'user'"),
    ([{"role": "gpt", "content": "Hi"}], "got 'gpt': write 'assistant'"),
    ([{"role": ["user"], "content": "Hi"}], "role: expected one of"),
    ([{"role": "user"}], "content: expected text, got null"),
    ([{"role": "user", "content": 5}], "content: expected text, got int"),
    ([{"role": "user", "content": {"type": "text", "text": "x"}}], "content: expected text, got dict"),
    ([{"role": "user", "content": []}], "content: expected text, got an empty list"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "a part of type 'image_url' (part 0)"),
    ([{"role": "user", "content": [{"type": "text", "text": None}]}], "content: expected text, got null in part 0"),
    ([{"role": "user", "content": b"\xff"}], "item 0, field 'content': expected text in UTF-8, got byte 0xff"),
    ([USER, {"role": "assistant", "content": None}, USER], "message 1: content: expected text, got null"),
    ([USER, {"role": "assistant", "function_call": {"name": "f"}}], "expected tool_calls, got OpenAI's older"),
    ([USER, {"role": "assistant", "tool_calls": {"name": "f"}}], "tool_calls: expected a list, got dict"),
    ([USER, {"role": "assistant", "tool_calls": ["f"]}], "message 1, tool call 0: expected {type, function}, got str"),
    (calling(arguments={}), "tool call 0: function: name: expected text, got null"),
    (calling(name="f", arguments="{"), "tool call 0: function: arguments: expected a JSON object"),
    (calling(name="f", arguments="[1]"), "arguments: expected an object, got list"),
    (calling(name="f", arguments=[1]), "arguments: expected an object, got list"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "message"), REFUSED)
def test_other_shapes_are_the_fault_of_their_row_with_what_to_write(value: Any, message: str) -> None:
    with pytest.raises(RowFaultError) as caught:
        conversation(value)
    assert caught.value.error.message.startswith("column 'chat'")
    assert message in caught.value.error.message


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ([USER], "got a message of role 'user'"),
        ([USER, {"role": "assistant", "content": " "}], "got one without text"),
        ([USER, {"role": "assistant", "tool_calls": [CALL]}], "got one without text"),
    ],
)
def test_only_a_text_of_the_assistant_can_be_continued(value: Any, got: str) -> None:
    with pytest.raises(
        RowFaultError, match=r"continue_final_message expects a last message of role 'assistant'"
    ) as caught:
        conversation(value, continues=True)
    assert got in caught.value.error.message
