"""How large a model is, from its configuration alone: what a forecast and a check of the memory need to know."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchllm_operators.records import Record
from batchllm_operators.specs.execution import ModelSpec

_LOGGER = logging.getLogger(__name__)

# Models with several towers keep the shape of the one that generates in a part of its own.
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")


class ModelShape(Record):
    """The size of a decoder: embeddings, and in each layer attention and a gated feed-forward part."""

    parameters: int
    """All of them, every expert included."""
    active_parameters: int
    """Those that one token is multiplied with: without the embedding table, and with the experts it is sent to."""
    kv_values: int
    """Numbers in the KV cache for one token, over all layers."""


class AttentionShape(Record):
    """The heads of a decoder's attention, of all ranks together."""

    layers: int
    heads: int
    """Query heads."""
    kv_heads: int
    head_size: int


def read_model_config(model: ModelSpec) -> dict[str, Any]:
    """The model's `config.json`: of a folder, or from the Hugging Face cache or hub; without weights or remote code.

    Empty, with a warning, where it cannot be read: whoever loads the model says so better.
    """
    try:
        if (file := Path(model.id) / "config.json").is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
        else:
            from transformers import PretrainedConfig

            config, _ = PretrainedConfig.get_config_dict(model.id, revision=model.revision)
    except (OSError, ValueError) as error:
        _LOGGER.warning("model.id: no configuration of %r: %s", model.id, error)
        return {}
    return config if isinstance(config, dict) else {}


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Whether the weights are stored in a quantised form, whose kernels say which dtype they compute in."""
    return any(part.get("quantization_config") for part in (config, _text_part(config)))


def model_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """The shape that a `config.json` tells; None where it lacks the names that Llama's descendants share.

    Norms, biases and routers are left out: together they are less than a hundredth.

    Args:
        config: as `read_model_config` returns it.
    """
    text, attention = _text_part(config), attention_shape(config)
    hidden, vocabulary, inner = (_number(text, name) for name in ("hidden_size", "vocab_size", "intermediate_size"))
    if attention is None or hidden is None or vocabulary is None or inner is None:
        return None
    layers, head_size = attention.layers, attention.head_size
    attention_parameters = hidden * head_size * (2 * attention.heads + 2 * attention.kv_heads)
    experts = _number(text, *_EXPERTS) or 1
    used = min(_number(text, "num_experts_per_tok") or 1, experts)
    expert = 3 * hidden * ((_number(text, "moe_intermediate_size") if experts > 1 else None) or inner)
    table = vocabulary * hidden
    tables = table if config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)) else 2 * table
    return ModelShape(
        parameters=layers * (attention_parameters + experts * expert) + tables,
        active_parameters=layers * (attention_parameters + used * expert) + table,
        kv_values=layers * 2 * attention.kv_heads * head_size,
    )


def attention_shape(config: Mapping[str, Any]) -> AttentionShape | None:
    """The heads that a `config.json` tells; None where it lacks the names that Llama's descendants share.

    Args:
        config: as `read_model_config` returns it.
    """
    text = _text_part(config)
    hidden, layers = _number(text, "hidden_size"), _number(text, "num_hidden_layers")
    heads = _number(text, "num_attention_heads")
    if hidden is None or layers is None or heads is None:
        return None
    kv_heads = _number(text, "num_key_value_heads") or heads
    return AttentionShape(
        layers=layers, heads=heads, kv_heads=kv_heads, head_size=_number(text, "head_dim") or hidden // heads or 1
    )


def stored_parameters(model: ModelSpec, config: Mapping[str, Any]) -> int | None:
    """Parameters by the size of the weight files in the model's folder; None where there are none, or no plain ones."""
    bits = {"float32": 32, "bfloat16": 16, "float16": 16}.get(str(config.get("dtype", config.get("torch_dtype"))))
    sizes = [sum(file.stat().st_size for file in Path(model.id).glob(pattern)) for pattern in _WEIGHT_FILES]
    size = next((one for one in sizes if one), 0)
    return size * 8 // bits if size and bits else None


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((part for name in _TEXT_PARTS if isinstance(part := config.get(name), dict)), config)


def _number(text: Mapping[str, Any], *names: str) -> int | None:
    """The first of some fields that is a positive whole number."""
    return next((value for name in names if type(value := text.get(name)) is int and value > 0), None)
