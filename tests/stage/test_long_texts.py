"""Prompts that are far too long: each is the error of its row, told before its text is tokenised or piles up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from batchllm_operators.stage import row_stager
from batchllm_operators.stage.token_bytes import token_bytes
from batchllm_operators.stage.token_encoding import FinalText, TokenEncoder
from tests.stage.conftest import Stage


@pytest.mark.parametrize(
    "prompt",
    [
        {"kind": "template", "template": "{{ 'long ' * 1000000 }}{{ text }}"},
        {"kind": "chat", "user": "{{ 'long ' * 1000000 }}{{ text }}"},
    ],
)
def test_a_text_that_cannot_fit_is_not_tokenised(
    stage: Stage, prompt: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenised: list[int] = []
    encode = TokenEncoder.encode

    def watched(self: TokenEncoder, texts: list[FinalText]) -> Any:
        tokenised.extend(len(text.text) for text in texts)
        return encode(self, texts)

    monkeypatch.setattr(TokenEncoder, "encode", watched)
    staged = stage([{"text": str(n)} for n in range(12)], prompt, model={"max_model_len": 512})
    assert {error and error[0] for error in staged.errors} == {"prompt_too_long"}
    assert staged.errors[0] is not None
    assert "characters, too many for 512 tokens, and max_model_len is 512" in staged.errors[0][1]
    assert max(tokenised, default=0) < 1000


def test_long_prompts_are_tokenised_a_few_at_a_time_with_the_same_result(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": None if n == 5 else f"{n} " * n} for n in range(1, 40)]
    whole = stage(rows, work="whole")
    monkeypatch.setattr(row_stager, "_CHARACTERS_AT_A_TIME", 50)
    at_a_time: list[int] = []
    encode = TokenEncoder.encode

    def watched(self: TokenEncoder, texts: list[FinalText]) -> Any:
        at_a_time.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(TokenEncoder, "encode", watched)
    pieces = stage(rows, work="pieces")
    assert pieces.rows == whole.rows
    assert len(at_a_time) > 10


@pytest.fixture(scope="module")
def encoder(tiny_llama: str) -> TokenEncoder:
    from transformers import AutoTokenizer

    return TokenEncoder(AutoTokenizer.from_pretrained(tiny_llama), "as_text")


@given(text=st.one_of(st.text(), st.text(" \n\t=-*_.", max_size=400), st.text("aA1 é漢🙂\x1d", max_size=200)))
def test_no_token_stands_for_more_bytes_than_are_counted_with(encoder: TokenEncoder, text: str) -> None:
    assert encoder.token_bytes is not None
    (ids,) = encoder.encode([FinalText(text)])
    assert encoder.token_bytes.fewest_tokens(text) <= len(ids)


def with_parts(model: Any, normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_only_where_all_text_becomes_tokens_is_there_a_bound() -> None:
    vocabulary = {"a": 0, "aaa": 1, "é": 2}
    of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = models.BPE(vocab=vocabulary, merges=[])
    llama2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_too = vocabulary | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    with_fallback = models.BPE(vocab=bytes_too, merges=[], byte_fallback=True)
    plain = token_bytes(with_parts(bpe, None, of_bytes))
    assert plain is not None
    assert (plain.most, plain.fewest_tokens("aaaaaaa"), plain.fewest_tokens("b" * 99)) == (3, 3, 0)
    composed = token_bytes(with_parts(bpe, normalizers.NFC(), of_bytes))
    assert composed is not None
    assert composed.most == 12
    llama = token_bytes(with_parts(with_fallback, llama2))
    assert llama is not None
    assert (llama.most, llama.left_out) == (6, b"")
    assert token_bytes(with_parts(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))) is None
    assert token_bytes(with_parts(bpe)) is None, "unknown characters are left out"
    assert token_bytes(with_parts(bpe, normalizers.Strip(), of_bytes)) is None
    assert token_bytes(with_parts(bpe, normalizers.Replace("aa", "a"), of_bytes)) is None
    assert token_bytes(with_parts(bpe, normalizers.Replace("é", "a"), of_bytes)) is None, "bytes count, not characters"
    cuts = pre_tokenizers.Split(" ", "isolated")
    assert token_bytes(with_parts(bpe, None, pre_tokenizers.Sequence([cuts, of_bytes]))) == plain
    for drops in (pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(" ", "removed")):
        assert token_bytes(with_parts(bpe, None, pre_tokenizers.Sequence([drops, of_bytes]))) is None
    unigram = models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)
    assert token_bytes(with_parts(unigram)) is None, "unknown characters beside each other are one token"
