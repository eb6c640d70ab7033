"""Names of engine backends in a job: `execution.backend`.

The backends themselves are in `batchllm_operators.execute.backends`, above the parts of a job, which only name them.
"""

from __future__ import annotations

from typing import Annotated

from batchllm_operators.registry import Registry, known_name

BACKENDS = Registry(
    kind="engine backend",
    group="batchllm_flows.engine_backends",
    contract="batchllm_operators.execute.backends.base:BackendKind",
    built_in={"local": "batchllm_operators.execute.backends.local:LOCAL"},
)


BackendName = Annotated[str, *known_name(BACKENDS)]
"""Name of an engine backend; the backend is imported when engines are opened, not when a job is read."""
