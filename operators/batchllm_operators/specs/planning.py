"""The planning part of a job."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from batchllm_operators.spec_base import SpecModel

FieldOrderChoice: TypeAlias = Literal["optimise", "as_given"]


SLOWEST, FASTEST = 1e-3, 1e15
"""Tokens a second that an engine can have measured: beyond them a rate is damage, and a forecast from it overflows."""


class CostModel(SpecModel):
    """Rates of one engine, as measured on its model and device.

    A step of the engine takes `step_seconds`, and for each token it computes or generates, and for each KV token that
    its generating requests read, the inverse of the rate.
    """

    step_seconds: float = Field(ge=0, le=3_600, description="seconds of a step that does nothing: reading the weights")
    prefill_tokens_per_second: float = Field(ge=SLOWEST, le=FASTEST, description="prompt tokens, beyond the step")
    decode_tokens_per_second: float = Field(
        ge=SLOWEST, le=FASTEST, description="generated tokens, beyond the step and reading KV"
    )
    kv_tokens_per_second: float = Field(
        ge=SLOWEST, le=FASTEST, description="KV tokens that attention reads while generating"
    )
    kv_capacity_tokens: int = Field(ge=1, le=10**12, description="tokens that the KV cache holds")
    max_running_requests: int = Field(ge=1, le=10**9, description="most requests in a step")


LARGEST_BLOCK = 1024


def _block_size(value: Any) -> Any:
    if value == "auto" or (type(value) is int and 1 <= value <= LARGEST_BLOCK):
        return value
    raise ValueError(f"expected 'auto' or a whole number from 1 to {LARGEST_BLOCK}")


class PlanningSpec(SpecModel):
    """How the requests of a job are grouped, ordered and packed."""

    block_size: Annotated[
        Annotated[int, Field(ge=1, le=LARGEST_BLOCK)] | Literal["auto"], BeforeValidator(_block_size)
    ] = Field(
        default="auto",
        description="tokens of a KV-cache block, in which prefixes are shared; `auto`: 16 where the machine that plans "
        "has a GPU, else 32; set 16 where a machine without GPU plans for engines on GPUs",
    )
    order: Literal["decode_first", "blend", "input"] = Field(
        default="decode_first",
        description="groups by decreasing decode/prefill ratio; or from both ends of that list, so that compute-heavy "
        "and memory-heavy work run together; or as given (for comparison)",
    )
    field_order: FieldOrderChoice = Field(
        default="optimise",
        description="prompt.kind fields: an order of the fields for each row, so that rows share longer prefixes; or "
        "as given",
    )
    bundle_minutes: float = Field(
        default=5.0, gt=0.0, description="estimated engine minutes of one bundle, the unit of dispatch and of retry"
    )
    pilot_fraction: float = Field(
        default=0.0, ge=0.0, le=0.5, description="share of the requests computed first, to learn output lengths from"
    )
    memory_gb: float = Field(
        default=4.0, gt=0.0, description="memory for block hashes; those of larger jobs stand on the local disk"
    )
    cost: CostModel | None = Field(
        default=None, description="rates of an engine, for the forecast; default: calibrated, else by hardware"
    )
