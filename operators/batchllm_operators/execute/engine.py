"""The contract of an inference engine: a loaded model that answers requests, many at a time.

An engine is driven by one thread: `submit` while `unfinished` is below `capacity`, then `step`, and again. Nothing
happens between two calls, as far as the driver can see. After `close` no other method is called.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from batchllm_kernels.vllm_plugin.options import PlannedRequest
from batchllm_operators.records import EngineSetting
from batchllm_operators.specs.sampling import SamplingParameters
from batchllm_operators.tasks.base import Answer


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt with its options."""

    key: bytes
    """16 bytes; no two requests that an engine holds have the same."""
    prompt_token_ids: list[int]
    sampling: SamplingParameters
    planned: PlannedRequest | None = None
    """What the plan says about it; None: nothing."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What a loaded engine runs on, and how much it takes."""

    device: str
    """Name and number of its devices, e.g. `1 x NVIDIA H200`."""
    vocabulary: int
    """Token ids are below this."""
    kv_capacity_tokens: int
    """Tokens that the KV cache holds."""
    max_running_requests: int
    """Most requests in a step."""
    max_request_tokens: int
    """Most tokens of a prompt and its completion."""
    max_step_tokens: int
    """Most tokens that a step computes."""
    dtype: str = "unknown"
    """It computes in, e.g. `bfloat16`."""


class Engine(Protocol):
    """A loaded model that answers requests in the order they are submitted, many at a time."""

    @property
    def limits(self) -> EngineLimits:
        """What it runs on, and how much it takes; the same at all times."""

    @property
    def settings(self) -> tuple[EngineSetting, ...]:
        """What decides its throughput, and who chose it; the same at all times."""

    @property
    def capacity(self) -> int:
        """Requests it should hold, so that it never runs dry between two steps; at least 1, and always the same."""

    @property
    def unfinished(self) -> int:
        """Requests that were submitted, not refused, and neither returned by `step` nor aborted."""

    @property
    def computed_tokens(self) -> int:
        """A number that changes whenever tokens were computed; it may fall, and no other meaning can be relied on."""

    def submit(self, request: Request) -> Answer | None:
        """Take a request, also beyond `capacity`. A refused one comes back as an answer with an error, and is not held.

        Raises:
            Exception: the engine is broken and can only be closed.
        """

    def step(self) -> list[Answer]:
        """Go on with the requests it holds; return those that finished, each once, in any order.

        Called only where `unfinished` is not 0. It may return nothing, as often as it computes without finishing.

        Raises:
            Exception: the engine is broken and can only be closed; the requests it held are lost.
        """

    def abort(self, keys: Collection[bytes]) -> None:
        """Forget the unfinished requests with these keys: no later `step` returns them, and they may be given again."""

    def close(self) -> None:
        """Free the device; harmless on a broken engine."""
