"""Base of every part of the job spec: frozen, and unknown keys are refused with the nearest valid name."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SpecModel(BaseModel):
    """A frozen part of the job spec that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in values:
            if key not in known and key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(known)}"
                raise ValueError(f"unknown key {key!r}; {hint}")
        return values


class StorageOptions(SpecModel):
    """How to reach an object store; credentials never stand here but come from the default chain.

    The chain is botocore's: environment variables, profiles, instance roles.
    """

    endpoint_url: str | None = Field(
        default=None, description="S3 endpoint of a store that is not AWS; default: AWS_ENDPOINT_URL or AWS itself"
    )
    profile: str | None = Field(default=None, description="named profile of the AWS configuration files")
    anonymous: bool = Field(default=False, description="read a public bucket without credentials")
