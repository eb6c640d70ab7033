"""What the plan says about the requests of an engine; a request that no plan knows is a group of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchllm_kernels.vllm_plugin.options import PlannedRequest

if TYPE_CHECKING:
    from vllm.v1.request import Request


def planned_request(request: Request) -> PlannedRequest | None:
    """What the plan says about a request; None for a request that no plan knows."""
    if request.sampling_params is not None:
        return PlannedRequest.from_extra_args(request.sampling_params.extra_args)
    pooling = request.pooling_params
    return None if pooling is None else PlannedRequest.from_extra_args(pooling.extra_kwargs)


def group_of(request: Request) -> str:
    """The name of the request's prefix group; its own id where no plan knows the request."""
    planned = planned_request(request)
    return planned.group if planned else str(request.request_id)


def prefix_tokens(request: Request) -> int:
    """Tokens that the request shares with its group, as planned; 0: none."""
    planned = planned_request(request)
    return planned.prefix_tokens if planned else 0


def expected_output_tokens(request: Request, most: int) -> int:
    """Output tokens that the plan expects of a request, at least 1; `most` where no plan knows the request."""
    planned = planned_request(request)
    return max(planned.expected_output_tokens, 1) if planned else most
