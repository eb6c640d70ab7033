"""The contract of a task: the columns of its answers, and the way to vLLM and back.

A task says what is its own; all tasks have the rest in common. Each request is a prompt of token ids, planned by shared
prefixes. Each answer has its request key, its counts of tokens and perhaps an error, and goes through result parts to
the output. `tests/tasks/test_contract.py` is what every task must keep.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from batchllm_operators.errors import RowError
from batchllm_operators.specs.sampling import SamplingParameters


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """The options of one request, as a task hands them to vLLM."""

    sampling: SamplingParameters
    """The sampling of the job with what its row overrides; a task that generates nothing passes over it."""
    plan: Mapping[str, Any] | None
    """What our scheduler is told of the request, as an entry of vLLM's parameters that no other code reads."""


class RefusedAnswerError(Exception):
    """vLLM's output is no answer; the message says why, and becomes the row's `engine_error`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request, or why there is none.

    Exactly one of `values` and `error` is None; with an error the counts are None too.
    """

    request_key: bytes
    values: tuple[Any, ...] | None = None
    """One value for each of the task's `answer_fields`, in their order."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """Those of the prompt that were found in the KV cache and not computed."""
    completion_tokens: int | None = None
    """Tokens generated; 0 for a task that generates none."""
    error: RowError | None = None


class Task(ABC):
    """What a model does with each prompt of a job. An instance has no state, and may be used from any thread.

    Attributes:
        name: in `task` of a job.
        runner: which of vLLM's runners the model is loaded for.
        answer_fields: columns of an answer in a result part, nullable; none of them is named as a column that all
            answers have: request_key, prompt_tokens, cached_tokens, completion_tokens, error.
        output_names: names of those of them that go to the output, in the order of its columns.
        text_name: name of the one that a person reads as a sample of the output; None: there is none to read.
    """

    name: str
    runner: Literal["generate", "pooling"]
    answer_fields: tuple[pa.Field, ...]
    output_names: tuple[str, ...]
    text_name: str | None = None

    @property
    def generates(self) -> bool:
        """Whether answers have generated tokens, whose number goes to the output."""
        return self.runner == "generate"

    @abstractmethod
    def to_vllm(self, request: TaskRequest) -> Any:
        """vLLM's `SamplingParams` or `PoolingParams` for a request; vLLM is imported here and not before.

        `request.plan` must go with them, as `SamplingParams.extra_args` or `PoolingParams.extra_kwargs`.

        Raises:
            ValueError: vLLM does not take these options.
        """

    @abstractmethod
    def from_vllm(self, output: Any) -> tuple[Any, ...]:
        """The values of an answer, by a finished `RequestOutput` or `PoolingRequestOutput`.

        Raises:
            RefusedAnswerError: the output is no answer.
        """

    def completion_tokens(self, output: Any) -> int:
        """The number of tokens that a finished output has generated."""
        return len(output.outputs[0].token_ids) if self.generates else 0
