"""Generation: one completion for each prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchllm_operators.task_names import GENERATE
from batchllm_operators.tasks.base import RefusedAnswerError, Task, TaskRequest

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

OUTPUT_TOKEN_IDS, COMPLETION, FINISH_REASON = "output_token_ids", "completion", "finish_reason"

ENDED_BY_LENGTH = "length"
"""The finish reason of a completion that ended at `max_tokens`."""


class Generation(Task):
    """Answers a prompt with text."""

    name = GENERATE
    runner = "generate"
    answer_fields = (
        pa.field(OUTPUT_TOKEN_IDS, pa.list_(pa.int32())),
        pa.field(COMPLETION, pa.string()),
        pa.field(FINISH_REASON, pa.string()),
    )
    output_names = (COMPLETION, FINISH_REASON)
    text_name = COMPLETION

    def to_vllm(self, request: TaskRequest) -> SamplingParams:
        """The sampling parameters of the request; only the finished output is wanted."""
        from vllm import SamplingParams
        from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams

        fields = request.sampling.model_dump(exclude_defaults=True)
        # Where our default is not vLLM's.
        fields |= {"temperature": request.sampling.temperature, "max_tokens": request.sampling.max_tokens}
        lists = {name: list(value) for name, value in fields.items() if isinstance(value, tuple)}
        if "repetition_detection" in fields:
            fields["repetition_detection"] = RepetitionDetectionParams(**fields["repetition_detection"])
        if request.sampling.structured_outputs is not None:
            fields["structured_outputs"] = StructuredOutputsParams(**request.sampling.structured_outputs.to_vllm())
        return SamplingParams(
            **(fields | lists),
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=None if request.plan is None else dict(request.plan),
        )

    def from_vllm(self, output: RequestOutput) -> tuple[Any, ...]:
        """Token ids, text and finish reason of the one completion."""
        completion = output.outputs[0]
        if completion.finish_reason in ("abort", "error"):
            raise RefusedAnswerError(f"vLLM ended the request: {completion.finish_reason}")
        return list(completion.token_ids), completion.text, completion.finish_reason


GENERATION = Generation()
