"""Base of every part of the job spec: frozen, and unknown keys are refused with the nearest valid name."""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args
from urllib.parse import unquote

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from batchllm_operators.errors import SecretInJobError
from batchllm_operators.wording import did_you_mean

_URL = r"\s*[a-zA-Z][\w+.-]*://"
_USER_INFO = re.compile(rf"{_URL}[^/?#\s]*@\S*\s*")
_SIGNED = re.compile(
    rf"{_URL}\S*[?&#](x-amz-signature|x-amz-security-token|x-goog-signature|signature|sig|\w*token|(api|access|secret)_?key"
    r"|password|secret)=\S*\s*",
    re.IGNORECASE,
)
_DEEPEST_PART = 4
"""Parts of a job within parts; deeper are settings of engines, which are looked at by themselves."""


def is_secret_url(text: str) -> bool:
    """Whether a text is a URL that lets in whoever has it: with user and password, or signed."""
    return any(form.fullmatch(way) for form in (_USER_INFO, _SIGNED) for way in (text, unquote(text)))


def _refuse_secret_urls(values: dict[Any, Any], prefix: str = "", depth: int = 1) -> None:
    for key, value in values.items():
        if isinstance(value, str) and is_secret_url(value):
            raise SecretInJobError(
                f"{prefix}{key}: expected a URL without user, password or signature, which would stand in databases and"
                " logs; credentials come from the environment, a profile or an instance role"
            )
        if isinstance(value, dict) and depth < _DEEPEST_PART:
            _refuse_secret_urls(value, f"{prefix}{key}.", depth + 1)


def _is_number(annotation: Any) -> bool:
    """Whether a field takes numbers, or none, and nothing else; others say themselves what they take."""
    kinds = set(get_args(annotation)) or {annotation}
    return kinds <= {int, float, type(None)} and kinds != {type(None)}


Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""Some texts; one alone stands for a list of it."""


class SpecModel(BaseModel):
    """A frozen part of the job spec that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        _refuse_secret_urls(values)
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in values:
            if key not in known and key not in cls.model_fields:
                hint = did_you_mean(str(key), known, f"valid keys: {', '.join(known)}")
                raise ValueError(f"unknown key {key!r}; {hint}")
        for name, field in cls.model_fields.items():
            value = values.get(field.alias or name)
            # To Python `true` is a 1.
            if isinstance(value, bool) and _is_number(field.annotation):
                raise ValueError(f"{field.alias or name}: expected a number, got {str(value).lower()}")
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
