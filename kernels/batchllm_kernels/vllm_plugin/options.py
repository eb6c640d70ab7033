"""The options in `additional_config["batchllm"]`, and what a request carries from the plan to the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

CONFIG_KEY = "batchllm"
"""Key of the options in vLLM's `additional_config`, and of a request's part in `SamplingParams.extra_args`."""

STEP_TRACE_VARIABLE = "BATCHLLM_STEP_TRACE"
"""Environment variable with the file to write the step trace to. It is no option, because vLLM hashes its options into
the key of its compilation cache, and a file name that changes would compile the model again."""

ATTENTION_TRACE_VARIABLE = "BATCHLLM_ATTENTION_TRACE"
"""Environment variable with the file that says of each step whether attention shared prefixes; it is no option for the
same reason."""


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """The mechanisms of the scheduler; each can be switched off, so that an ablation shows what it is worth."""

    admit_by_peak: bool = True
    """Admit a request only when the predicted peak of KV use fits the cache."""
    pin_prefixes: bool = True
    """Keep the current group's prefix in the cache until its last member is admitted."""
    lead_first: bool = True
    """Admit no request while another one is computing blocks that the two share."""
    overtake: bool = True
    """While the head of the queue waits for memory, admit a smaller request of its group."""
    spread_ends: bool = True
    """Once output lengths are known, admit single requests that grow one by one, so that they do not end together."""
    cheapest_victim: bool = True
    """When memory runs out, preempt the request that costs least to compute again."""
    correct_estimates: bool = True
    """Correct expected output lengths by the lengths of requests that have ended."""
    watermark: float = 0.01
    """Share of the KV cache that admission leaves free."""

    @classmethod
    def from_additional_config(cls, additional_config: object) -> SchedulerOptions:
        """The options of an engine.

        Raises:
            ValueError: an unknown option, or a value of another type or out of its range.
        """
        given = additional_config.get(CONFIG_KEY, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise ValueError(f"additional_config[{CONFIG_KEY!r}]: expected a mapping, got {given!r}")  # noqa: TRY004  # vLLM's users expect ValueError of a bad config
        known = {field.name: type(field.default) for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in known:
                raise ValueError(
                    f"additional_config[{CONFIG_KEY!r}]: unknown option {name!r}, expected one of {sorted(known)}"
                )
            if type(value) is not known[name]:
                raise ValueError(
                    f"additional_config[{CONFIG_KEY!r}][{name!r}]: expected {known[name].__name__}, got {value!r}"
                )
            values[name] = value
        options = cls(**values)
        if not 0.0 <= options.watermark < 1.0:
            raise ValueError(
                f"additional_config[{CONFIG_KEY!r}]['watermark']: expected 0 <= watermark < 1, got {options.watermark}"
            )
        return options


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """What the plan says about a request.

    It travels in `SamplingParams.extra_args["batchllm"]`, or in `PoolingParams.extra_kwargs["batchllm"]`.
    """

    group: str
    """Name of the request's prefix group, different from the name of every other group that the engine gets."""
    prefix_tokens: int
    """Tokens that the request shares with its group, a multiple of the block size; 0: none."""
    expected_output_tokens: int

    def as_extra_args(self) -> dict[str, Any]:
        """The value for `SamplingParams.extra_args`."""
        return {
            CONFIG_KEY: {
                "group": self.group,
                "prefix_tokens": self.prefix_tokens,
                "expected_output_tokens": self.expected_output_tokens,
            }
        }

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> PlannedRequest | None:
        """What a request carries from the plan; None for a request that no plan knows."""
        given = (extra_args or {}).get(CONFIG_KEY)
        return None if given is None else cls(**given)
