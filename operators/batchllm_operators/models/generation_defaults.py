"""Sampling as the authors of a model recommend it, in `generation_config.json` beside its weights."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from batchllm_operators.errors import TerminalError
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.sampling import SamplingSpec
from batchllm_operators.wording import fault_text

FILE = "generation_config.json"
_NAMES = {
    **{name: name for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")},
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p")},
    "max_new_tokens": "max_tokens",
}
"""What vLLM takes of such a file (0.32, `ModelConfig.get_diff_sampling_param`), with our names."""


def with_model_defaults(sampling: SamplingSpec, model: ModelSpec) -> SamplingSpec:
    """Sampling in which the model's own defaults stand where the job sets nothing, if the job wants them.

    Args:
        sampling: of the job.
        model: of the job; `generation_config` and `override_generation_config` of its engine arguments count as in
            vLLM.

    Raises:
        TerminalError: the model's file cannot be read, or has values that no completion can be sampled with.
    """
    if sampling.defaults != "model":
        return sampling
    own = {name: value for name, value in _defaults(model).items() if name not in sampling.model_fields_set}
    given = {name: getattr(sampling, name) for name in sampling.model_fields_set}
    try:
        return SamplingSpec.model_validate({**own, **given, "defaults": "batchllm"})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = ".".join(map(str, fault["loc"]))
        raise TerminalError(
            f"sampling.defaults: {FILE} of {model.id!r} has {name} {own.get(name)!r}: {fault_text(fault['msg'])}; set "
            f"sampling.{name} in the job"
        ) from error


def _defaults(model: ModelSpec) -> dict[str, Any]:
    from transformers import GenerationConfig

    named, overridden = (model.engine_args.get(name) for name in ("generation_config", "override_generation_config"))
    place = named if isinstance(named, str) and named not in ("auto", "vllm") else model.id
    try:
        config = GenerationConfig.from_pretrained(place, revision=model.revision if place == model.id else None)
        found = config.to_diff_dict()
    except (OSError, TypeError, ValueError, AttributeError) as error:  # what transformers raises for a broken file
        if overridden is None:
            raise TerminalError(
                f"sampling.defaults: expected {FILE} of the model {place!r}, which cannot be read: {error}"
            ) from error
        found = {}
    if isinstance(overridden, dict):
        found |= overridden
    return {ours: found[theirs] for theirs, ours in _NAMES.items() if found.get(theirs) is not None}
