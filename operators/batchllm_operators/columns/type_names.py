"""Names of column types, as `source.schema` of a job spells them.

They are the names under which Arrow prints its types, so that what a message says of a column can be copied into a job.
"""

from __future__ import annotations

import re

import pyarrow as pa

_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*|[0-9]+|[<>\[\](),:=]|\"[^\"]*\"|[^\s<>\[\](),:=\"]+)")
_DECIMALS = {
    "decimal": pa.decimal128, "decimal32": pa.decimal32, "decimal64": pa.decimal64, "decimal128": pa.decimal128,
    "decimal256": pa.decimal256,
}  # fmt: skip
_LISTS = {"list": pa.list_, "large_list": pa.large_list}
EXAMPLES = 'int64, double, string, binary, bool, date32, "timestamp[us, UTC]", "decimal128(20, 0)", list<string>, json'


def type_named(name: str) -> pa.DataType:
    """The type of this name, e.g. `int64`, `timestamp[us, UTC]`, `decimal128(20, 0)`, `list<struct<a: string>>`.

    `json` is text that holds any JSON value.

    Raises:
        ValueError: no such type; gives examples.
    """
    try:
        kind, rest = _type(_TOKEN.findall(name))
    except (ValueError, IndexError, pa.ArrowException) as error:
        raise _unknown(name) from error
    if rest or _TOKEN.sub("", name).strip():
        raise _unknown(name)
    return kind


def _unknown(name: str) -> ValueError:
    return ValueError(f"expected the name of a column type, such as {EXAMPLES}; got {name!r}")


def _type(words: list[str]) -> tuple[pa.DataType, list[str]]:
    """The type at the beginning of the words, and the words after it."""
    word, *rest = words
    if word in _LISTS:
        rest = _after(rest, "<")
        item, rest = _type(rest[2:] if rest[1] == ":" else rest)  # Arrow prints list<item: int64>
        return _LISTS[word](item), _after(rest, ">")
    if word == "map":
        key, rest = _type(_after(rest, "<"))
        value, rest = _type(_after(rest, ","))
        return pa.map_(key, value), _after(rest, ">")
    if word == "struct":
        return _struct(_after(rest, "<"))
    if word in _DECIMALS:
        precision, comma, scale, *rest = _after(rest, "(")
        _after([comma], ",")
        return _DECIMALS[word](int(precision), int(scale)), _after(rest, ")")
    if rest[:1] == ["["]:
        unit, *rest = rest[1:]
        if word == "timestamp" and rest[0] == ",":
            end = rest.index("]")
            zone = "".join(rest[1:end]).removeprefix("tz=")
            return pa.timestamp(unit, zone), rest[end + 1 :]
        return pa.type_for_alias(f"{word}[{unit}]"), _after(rest, "]")
    return (pa.json_() if word == "json" else pa.type_for_alias(word)), rest


def _struct(words: list[str]) -> tuple[pa.DataType, list[str]]:
    fields = []
    rest = [",", *words]
    while rest[0] != ">":
        name, *rest = _after(rest, ",")
        kind, rest = _type(_after(rest, ":"))
        fields.append(pa.field(name.strip('"'), kind))
    return pa.struct(fields), rest[1:]


def _after(words: list[str], expected: str) -> list[str]:
    if words[0] != expected:
        raise ValueError(f"expected {expected}, got {words[0]}")
    return words[1:]
