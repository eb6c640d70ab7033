"""How much text one token can stand for: a text of more has too many tokens, which need not be counted to be known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_SHRINKING = {"NFC": 4, "Prepend": 1, "Replace": 1}
"""Normalisers that make a text shorter by a bounded factor: NFC joins at most three characters into one."""
_WRITTEN_AS_THEY_ARE = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """What is known of a tokenizer without using it.

    Attributes:
        most: bytes of UTF-8 that one token stands for, at the most.
        left_out: bytes that have no token and vanish: some vocabularies have none for control characters.
    """

    most: int
    left_out: bytes = b""

    def fewest_tokens(self, text: str) -> int:
        """Tokens that a text has at the least."""
        return -(-len(text.encode().translate(None, self.left_out)) // self.most)


def token_bytes(backend: Any) -> TokenBytes | None:
    """What the tokens of a tokenizer stand for.

    Args:
        backend: a tokenizer of the package `tokenizers`.

    Returns:
        None where it is not bounded: where unknown text of any length is one token, or space is left out.
    """
    from tokenizers.models import BPE

    model = backend.model
    is_of_bytes = any(part["type"] == "ByteLevel" for part in _parts(backend.pre_tokenizer))
    if not isinstance(model, BPE) or not (is_of_bytes or model.byte_fallback):
        return None
    if not all(_keeps_text(part) for part in _parts(backend.pre_tokenizer)):
        return None
    normalizers = _parts(backend.normalizer)
    if any(_shrinks_without_bound(part) for part in normalizers):
        return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None  # they take all the space beside them
    vocabulary = backend.get_vocab(with_added_tokens=True)
    names = _names_of_bytes() if is_of_bytes else [f"<0x{byte:02X}>" for byte in range(256)]
    left_out = bytes(byte for byte, name in enumerate(names) if name not in vocabulary)
    if left_out and not is_of_bytes:
        return None  # what has no token of its own is one unknown token, however long
    factor = max((_SHRINKING[part["type"]] for part in normalizers), default=1)
    return TokenBytes(factor * max(len(token.encode()) for token in vocabulary), left_out)


def _names_of_bytes() -> list[str]:
    """The character that stands for each byte in vocabularies of bytes, as GPT-2 chose them."""
    others = iter(range(256, 512))
    return [chr(byte) if byte in _WRITTEN_AS_THEY_ARE else chr(next(others)) for byte in range(256)]


def _parts(component: Any) -> list[dict[str, Any]]:
    """The settings of a normaliser or pre-tokenizer, those of a sequence one by one."""
    if component is None:
        return []
    settings: dict[str, Any] = json.loads(component.__getstate__())
    inner = settings.get("normalizers") or settings.get("pretokenizers")
    return list(inner) if inner is not None else [settings]


def _keeps_text(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer leaves no text out; one that is not known may."""
    if pre_tokenizer["type"] in ("Split", "Punctuation"):
        return bool(pre_tokenizer["behavior"] != "Removed")
    return pre_tokenizer["type"] in ("ByteLevel", "Digits", "Metaspace")


def _shrinks_without_bound(normalizer: dict[str, Any]) -> bool:
    if normalizer["type"] == "Replace":
        pattern: dict[str, str] = normalizer["pattern"]
        return "String" not in pattern or len(normalizer["content"].encode()) < len(pattern["String"].encode())
    return normalizer["type"] not in _SHRINKING
