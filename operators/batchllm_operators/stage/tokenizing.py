"""The model's tokenizer and limits, loaded without the model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from batchllm_operators.errors import RowErrorCode, TerminalError
from batchllm_operators.models.model_files import looks_like_path
from batchllm_operators.records import Record
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.stage.faults import RowFaultError, invalid_row
from batchllm_operators.stage.rendering import Conversation, Prompt, TextPrompt, TokenPrompt
from batchllm_operators.stage.special_tokens import mapped_texts, texts_within
from batchllm_operators.stage.token_encoding import FinalText, TokenEncoder, TokenIds, encodable
from batchllm_operators.wording import counted

# What model families call the length they were trained for; the same names as vLLM looks for.
_LENGTH_FIELDS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx",
    "model_max_length", "max_target_positions",
)  # fmt: skip
# Loading reads files that anyone may have written: these are what damaged or missing ones raise.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)


class ModelLimits(Record):
    """What a prompt must fit into."""

    max_model_len: int
    """Most tokens of prompt and completion."""
    vocab_size: int
    """Token ids are below this."""


def model_limits(model: ModelSpec) -> ModelLimits:
    """The limits of a model, from the job (`model.max_model_len`) or else from the model's configuration.

    Raises:
        TerminalError: no such model, or its configuration tells no length.
    """
    _refuse_missing_folder(model.id)
    if Path(model.id).is_dir() and not (Path(model.id) / "config.json").exists():
        raise TerminalError(f"model.id: not a model in Hugging Face layout (no config.json): {model.id!r}")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            model.id, revision=model.revision, trust_remote_code=_trusts_remote_code(model)
        ).get_text_config()
    except _LOAD_ERRORS as error:
        raise _not_loaded("configuration", model.id, error) from error
    lengths = [value for name in _LENGTH_FIELDS if isinstance(value := getattr(config, name, None), int)]
    if model.max_model_len is None and not lengths:
        raise TerminalError(
            f"model.id: the configuration of {model.id!r} tells no length: set model.max_model_len",
        )
    return ModelLimits(max_model_len=model.max_model_len or lengths[0], vocab_size=config.vocab_size)


class PromptTokenizer:
    """Makes token ids of prompts as vLLM would, but for text of rows that looks like special tokens.

    Args:
        model: whose tokenizer to load.
        special_tokens: what becomes of text of rows that looks like a special token.
        max_model_len: tokens into which a prompt must fit; a text that surely does not is not tokenised. None: all are.

    Attributes:
        special_tokens: the special tokens that prompts mark as their own.

    Raises:
        TerminalError: no such model, or it has no tokenizer.
    """

    def __init__(
        self,
        model: ModelSpec,
        special_tokens: Literal["as_text", "allow"] = "as_text",
        max_model_len: int | None = None,
    ) -> None:
        _refuse_missing_folder(model.id)
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                model.id, revision=model.revision, trust_remote_code=_trusts_remote_code(model)
            )
            self._encoder = TokenEncoder(self._tokenizer, special_tokens)
        except _LOAD_ERRORS as error:
            raise _not_loaded("tokenizer", model.id, error) from error
        self.special_tokens = self._encoder.special_tokens
        self._name = model.id
        self._max_model_len = max_model_len

    def require_chat_template(self) -> None:
        """Refuse a model without chat template.

        Raises:
            TerminalError: says what to use instead.
        """
        if not self._tokenizer.chat_template:
            raise TerminalError(
                f"prompt.kind: {self._name!r} has no chat template, which kinds chat, messages and fields need:"
                " use kind template or column"
            )

    def tokenize(self, prompts: list[Prompt]) -> list[TokenIds | RowFaultError]:
        """Token ids of each prompt, int32, or its fault: a conversation that the chat template refuses, a text that is
        surely too long.
        """
        results: list[TokenIds | RowFaultError | None] = [None] * len(prompts)
        texts: dict[int, FinalText] = {}
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, TokenPrompt):
                results[index] = prompt.token_ids
                continue
            try:
                texts[index] = self._not_hopeless(
                    self._encoder.text(prompt.text) if isinstance(prompt, TextPrompt) else self._chat_text(prompt)
                )
            except RowFaultError as fault:
                results[index] = fault
        for index, token_ids in zip(texts, self._encoder.encode(list(texts.values())), strict=True):
            results[index] = token_ids
        return [
            invalid_row("the prompt has no tokens") if result is None or _is_empty(result) else result
            for result in results
        ]

    def _not_hopeless(self, text: FinalText) -> FinalText:
        """The text; raises where it does not fit the model even in the largest tokens there are."""
        known, limit = self._encoder.token_bytes, self._max_model_len
        # A text has no fewer bytes than characters: what is short enough by these need not be looked at.
        if known is None or limit is None or len(text.text) <= limit or known.fewest_tokens(text.text) <= limit:
            return text
        raise RowFaultError(
            RowErrorCode.PROMPT_TOO_LONG,
            f"the prompt has {counted(len(text.text), 'character')}, too many for {limit:,} tokens, and max_model_len"
            f" is {limit}",
        )

    def _chat_text(self, conversation: Conversation) -> FinalText:
        """The text of the chat template, with markers for its special tokens where text of the row looks like some."""
        special, messages = self.special_tokens, conversation.messages
        texts = list(map(encodable, texts_within(messages)))
        looks_special = any(map(special.found_in, texts))
        if any(map(special.marked_in, texts)):
            plain = Conversation(mapped_texts(messages, special.plain), conversation.continues)
        else:
            plain = conversation
        rendered = self._applied(plain)
        if not looks_special:
            return FinalText(rendered)
        # What looks special once that of the row is hidden from the template is the template's own.
        hidden = self._applied(Conversation(mapped_texts(messages, special.hide), conversation.continues))
        marked = special.show(special.mark(hidden))
        if special.plain(marked) != rendered:
            raise invalid_row(
                "the model's chat template acts on special tokens within the messages, which are text here: set"
                " prompt.special_tokens: allow"
            )
        return self._encoder.marked(marked, adds_special_tokens=False)

    def _applied(self, conversation: Conversation) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                conversation.messages,
                tokenize=False,
                add_generation_prompt=not conversation.continues,
                continue_final_message=conversation.continues,
            )
        except Exception as error:
            # The model's own template refuses, for example, two user messages in a row, by any kind of exception.
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise invalid_row(f"the model's chat template refuses the messages: {reason}") from error
        return text


def _is_empty(result: TokenIds | RowFaultError) -> bool:
    return not isinstance(result, RowFaultError) and not len(result)


def _trusts_remote_code(model: ModelSpec) -> bool:
    return bool(model.engine_args.get("trust_remote_code", False))


def _refuse_missing_folder(name: str) -> None:
    """A path that does not exist is said to be just that, not an unknown name on a hub."""
    if looks_like_path(name) and not Path(name).exists():
        raise TerminalError(f"model.id: no such folder: {name!r}")


def _not_loaded(what: str, name: str, error: Exception) -> TerminalError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    advice = "" if Path(name).is_dir() else "; check the name and the network, or name a folder that holds the model"
    return TerminalError(f"model.id: cannot load the {what} of {name!r}: {reason.rstrip('.')}{advice}")
