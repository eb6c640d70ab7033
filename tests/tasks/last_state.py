"""A task as a package from outside adds it: the model's state after the last token of the prompt, and its length."""

import math
from typing import Any

import pyarrow as pa

from batchllm_operators.tasks import RefusedAnswerError, Task, TaskRequest


class LastState(Task):
    name = "last_state"
    runner = "pooling"
    answer_fields = (pa.field("state", pa.list_(pa.float32())), pa.field("state_norm", pa.float32()))
    output_names = ("state_norm", "state")

    def to_vllm(self, request: TaskRequest) -> Any:
        from vllm import PoolingParams

        return PoolingParams(
            task="embed", use_activation=False, extra_kwargs=None if request.plan is None else dict(request.plan)
        )

    def from_vllm(self, output: Any) -> tuple[Any, ...]:
        state = output.outputs.data.float().tolist()
        if not all(map(math.isfinite, state)):
            raise RefusedAnswerError("the model's state is not finite")
        return state, math.hypot(*state)


LAST_STATE = LastState()
