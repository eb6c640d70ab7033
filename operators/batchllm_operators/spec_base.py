"""Base of every part of the job spec: frozen, and unknown keys are refused with the nearest valid name."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from batchllm_operators.errors import SecretInJobError
from batchllm_operators.wording import did_you_mean

_USER_INFO = re.compile(r"\s*[a-zA-Z][\w+.-]*://[^/?#\s]*@\S*\s*")


def has_user_info(text: str) -> bool:
    """Whether a text is a URL with user and password."""
    return _USER_INFO.fullmatch(text) is not None


class SpecModel(BaseModel):
    """A frozen part of the job spec that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key, value in values.items():
            if isinstance(value, str) and has_user_info(value):
                raise SecretInJobError(
                    f"{key}: expected a URL without user and password, which would stand in databases and logs; "
                    "credentials come from the environment, a profile or an instance role"
                )
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in values:
            if key not in known and key not in cls.model_fields:
                hint = did_you_mean(str(key), known, f"valid keys: {', '.join(known)}")
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
