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
    text = _text_part(config)

    def number(*names: str, default: int | None = None) -> int | None:
        found = (value for name in names if type(value := text.get(name)) is int and value > 0)
        return next(found, default)

    hidden, layers, vocabulary = number("hidden_size"), number("num_hidden_layers"), number("vocab_size")
    heads, inner = number("num_attention_heads"), number("intermediate_size")
    if hidden is None or layers is None or vocabulary is None or heads is None or inner is None:
        return None
    kv_heads = number("num_key_value_heads", default=heads) or heads
    head_size = number("head_dim", default=hidden // heads) or 1
    attention = hidden * head_size * (2 * heads + 2 * kv_heads)
    experts = number(*_EXPERTS, default=1) or 1
    used = min(number("num_experts_per_tok", default=1) or 1, experts)
    expert = 3 * hidden * ((number("moe_intermediate_size") if experts > 1 else None) or inner)
    table = vocabulary * hidden
    tables = table if config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)) else 2 * table
    return ModelShape(
        parameters=layers * (attention + experts * expert) + tables,
        active_parameters=layers * (attention + used * expert) + table,
        kv_values=layers * 2 * kv_heads * head_size,
    )


def stored_parameters(model: ModelSpec, config: Mapping[str, Any]) -> int | None:
    """Parameters by the size of the weight files in the model's folder; None where there are none, or no plain ones."""
    bits = {"float32": 32, "bfloat16": 16, "float16": 16}.get(str(config.get("dtype", config.get("torch_dtype"))))
    sizes = [sum(file.stat().st_size for file in Path(model.id).glob(pattern)) for pattern in _WEIGHT_FILES]
    size = next((one for one in sizes if one), 0)
    return size * 8 // bits if size and bits else None


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((part for name in _TEXT_PARTS if isinstance(part := config.get(name), dict)), config)
