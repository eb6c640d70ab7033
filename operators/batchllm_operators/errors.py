"""What can go wrong with a job, and whether trying again can help.

Retry decisions are made by class: `TransientError` may pass on another attempt, `TerminalError` cannot.
Faults of one row are no exceptions but data: a `RowError` travels with the row to the sink.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class BatchLLMError(Exception):
    """Base of all errors of a job; picklable, and says where it happened.

    Attributes:
        job_id: the job, once its id is known.
        bundle: name of the bundle that was running.
        uri: the object or folder concerned.
    """

    def __init__(
        self, message: str, *, job_id: str | None = None, bundle: str | None = None, uri: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.job_id = job_id
        self.bundle = bundle
        self.uri = uri

    def __str__(self) -> str:
        where = [f"{name} {value}" for name in ("job_id", "bundle", "uri") if (value := getattr(self, name))]
        return f"{self.message} ({', '.join(where)})" if where else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.message, self.job_id, self.bundle, self.uri)


def _restore(
    kind: type[BatchLLMError], message: str, job_id: str | None, bundle: str | None, uri: str | None
) -> BatchLLMError:
    return kind(message, job_id=job_id, bundle=bundle, uri=uri)


class TransientError(BatchLLMError):
    """Another attempt may pass: throttling, a timeout, a lost engine."""


class EngineDiedError(TransientError):
    """An engine died, broke or fell silent while it worked: one of its requests may be the reason."""


class TerminalError(BatchLLMError):
    """No further attempt can pass: a bad spec, a missing object, a model that does not load."""


class NoInputError(TerminalError):
    """A source in which nothing is to be read."""


class SecretInJobError(TerminalError):
    """A job holds a password or a token, which would stand in databases, logs and work folders; names the field only.

    Raised out of validation as it is: pydantic's own error would show the value.
    """


class DamagedObjectError(TerminalError):
    """An object is there, and is not what was written: cut off, of other bytes, or somebody else's."""


class RowErrorCode(StrEnum):
    """Kinds of row errors; the value is what stands in the sink."""

    INVALID_ROW = "invalid_row"
    TEMPLATE_ERROR = "template_error"
    PROMPT_TOO_LONG = "prompt_too_long"
    ENGINE_ERROR = "engine_error"


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one row has no answer."""

    code: RowErrorCode
    message: str
