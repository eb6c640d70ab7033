"""Names of tasks in a job: `task`, what the model does with each prompt.

The tasks themselves are in `batchllm_operators.tasks`, above the parts of a job, which only name them.
"""

from __future__ import annotations

from typing import Annotated

from batchllm_operators.registry import Registry, known_name

GENERATE = "generate"
"""The task of a job that names none."""

TASKS = Registry(
    kind="task",
    group="batchllm_flows.tasks",
    contract="batchllm_operators.tasks.base:Task",
    built_in={GENERATE: "batchllm_operators.tasks.generate:GENERATION"},
)

TaskName = Annotated[str, *known_name(TASKS)]
"""Name of a task; the task is imported when it is used, not when a job is read."""
