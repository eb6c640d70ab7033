"""The special tokens of a tokenizer within texts: which belong to the job, and which are text of a row.

A tokenizer makes a control token of every text that looks like one, whoever wrote it. Here the special tokens that the
job's own templates write are replaced by markers before a row's text comes in, so that whatever looks like one
afterwards is text of the row.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Iterator
from typing import Any

from batchllm_operators.stage.faults import invalid_row

# Unicode's characters for the use within a program, which no text holds, and digits: no letters that a filter could
# change, no white space that it could trim.
_OWN, _HIDDEN, _END = "\ufdd0", "\ufdd1", "\ufdd2"


class SpecialTokens:
    """The texts of special tokens, and markers that stand for them in a text.

    A marker holds a random number of 64 bits, so that no row can hold one.

    Args:
        texts: of the special tokens; none where text of rows may make control tokens.
        whole_words: those that are special tokens only where no letter or digit stands beside them.
        normalized: what the tokenizer makes of a text before it looks for special tokens, where it does.

    Attributes:
        texts: of the special tokens, by number.
    """

    def __init__(
        self,
        texts: Collection[str] = (),
        whole_words: Collection[str] = (),
        normalized: Callable[[str], str] | None = None,
    ) -> None:
        self.texts = tuple(texts)
        self._numbers = {text: number for number, text in enumerate(self.texts)}
        self._nonce = f"{secrets.randbits(64):020d}"
        self._pattern = _any_of(self.texts, whole_words)
        self._marker = re.compile(f"[{_OWN}{_HIDDEN}]{self._nonce}([0-9]+){_END}")
        self._hidden = re.compile(f"{_HIDDEN}{self._nonce}([0-9]+){_END}")
        self._normalized = normalized
        self._normalized_pattern = _any_of([normalized(text) for text in self.texts], ()) if normalized else None

    def found_in(self, text: str) -> bool:
        """Whether the text holds what the tokenizer would take for a special token; markers do not count."""
        if self._pattern is None:
            return False
        if self._pattern.search(text):
            return True
        if self._normalized is None or self._normalized_pattern is None:
            return False
        return self._normalized_pattern.search(self._normalized(text)) is not None

    def marked_in(self, text: str) -> bool:
        """Whether the text holds markers."""
        return self._nonce in text

    def marker(self, number: int) -> str:
        """The marker of a special token that belongs to the job."""
        return f"{_OWN}{self._nonce}{number}{_END}"

    def mark(self, text: str) -> str:
        """The text with markers for its special tokens: they belong to the job."""
        return self._replaced(text, _OWN)

    def hide(self, text: str) -> str:
        """The text with markers for its special tokens that are text of a row."""
        return self._replaced(text, _HIDDEN)

    def show(self, text: str) -> str:
        """The text with what `hide` hid."""
        return self._hidden.sub(self._text_of, text)

    def plain(self, text: str) -> str:
        """The text without markers."""
        return self._marker.sub(self._text_of, text) if self.marked_in(text) else text

    def whole(self, text: str) -> str:
        """The text that a template made of one with markers.

        Raises:
            RowFaultError: it cut a marker in two.
        """
        rest = self._marker.sub("", text)
        if _OWN in rest or _END in rest:
            raise invalid_row("the template cuts a special token in two on this row: set prompt.special_tokens: allow")
        return text

    def _replaced(self, text: str, kind: str) -> str:
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda found: f"{kind}{self._nonce}{self._numbers[found[0]]}{_END}", text)

    def _text_of(self, marker: re.Match[str]) -> str:
        return self.texts[int(marker[1])]


def texts_within(value: Any) -> Iterator[str]:
    """All texts within the value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts_within(key)
            yield from texts_within(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_within(item)


def mapped_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text within it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {mapped_texts(key, change): mapped_texts(item, change) for key, item in value.items()}
    return [mapped_texts(item, change) for item in value] if isinstance(value, list) else value


def _any_of(texts: Collection[str], whole_words: Collection[str]) -> re.Pattern[str] | None:
    """A pattern that finds the leftmost and longest of the texts, as tokenizers do."""
    if not texts:
        return None
    longest_first = sorted(texts, key=len, reverse=True)
    patterns = [
        rf"(?<!\w){re.escape(text)}(?!\w)" if text in whole_words else re.escape(text) for text in longest_first
    ]
    return re.compile("|".join(patterns))
