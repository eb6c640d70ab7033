"""The planning part of a job."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from batchllm_operators.spec import SpecModel


class PlanningSpec(SpecModel):
    """How the requests of a job are grouped, ordered and packed."""

    block_size: int = Field(
        default=32, ge=1, le=1024, description="tokens of a KV-cache block; prefixes are shared in whole blocks"
    )
    order: Literal["decode_first", "input"] = Field(
        default="decode_first", description="groups by decreasing decode/prefill ratio, or as given (for comparison)"
    )
    bundle_minutes: float = Field(
        default=5.0, gt=0.0, description="estimated engine minutes of one bundle, the unit of dispatch and of retry"
    )
