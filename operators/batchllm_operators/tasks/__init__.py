"""Tasks: what a model does with a prompt, and what an answer is made of. Generation is built in.

To add one, see the contract in `base`: subclass `Task` and register an instance, by `register_task` in the processes
you start yourself, or by an entry point in the group `batchllm_flows.tasks`, which the command line, Prefect's workers
and engine processes find too.
"""

from __future__ import annotations

from batchllm_operators.errors import TerminalError
from batchllm_operators.task_names import TASKS
from batchllm_operators.tasks.base import Answer, RefusedAnswerError, Task, TaskRequest

__all__ = ["Answer", "RefusedAnswerError", "Task", "TaskRequest", "register_task", "task_named", "unregister_task"]


def register_task(added: Task) -> None:
    """Make a task known to this process; the same one twice is no error.

    Raises:
        TypeError: not a `Task`.
        ValueError: another task has the name.
    """
    TASKS.register(added)


def unregister_task(name: str) -> None:
    """Take back what `register_task` added.

    Raises:
        KeyError: it added no task of this name.
    """
    TASKS.remove(name)


def task_named(name: str) -> Task:
    """The task of a name.

    Raises:
        TerminalError: no such task, or the package that brings it cannot be imported.
    """
    try:
        found: Task = TASKS.get(name)
    except ValueError as error:
        raise TerminalError(f"task: {error}") from error
    return found
