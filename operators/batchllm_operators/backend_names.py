"""Names of engine backends in a job: `execution.backend`.

The backends themselves are in `batchllm_operators.execute.backends`, above the parts of a job, which only name them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from batchllm_operators.registry import Registry

BACKENDS = Registry(
    kind="engine backend",
    group="batchllm_flows.engine_backends",
    contract="batchllm_operators.execute.backends.base:BackendKind",
    built_in={"local": "batchllm_operators.execute.backends.local:LOCAL"},
)


@dataclass(frozen=True)
class _KnownNames:
    """Lists the names in the JSON Schema of a job: a form shows them as a choice."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": BACKENDS.names()}


def _known(name: str) -> str:
    if name not in BACKENDS.names():
        BACKENDS.get(name)
    return name


BackendName = Annotated[str, AfterValidator(_known), _KnownNames()]
"""Name of an engine backend; the backend is imported when engines are opened, not when a job is read."""
