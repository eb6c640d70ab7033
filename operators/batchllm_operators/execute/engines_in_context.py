"""The engines and the runner that a flow has opened, for the tasks inside it.

A task run gets an `EngineWork`, which is small and says everything. Engines are warm in the process that opened them,
and Prefect runs each task of a thread runner in a copy of its flow's context, so there the tasks find them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.bundle_runner import BundleRunner
from batchllm_operators.execute.engine_work import EngineWork
from batchllm_operators.execute.fleet import EngineFleet
from batchllm_operators.specs.execution import ExecutionSpec

_WHERE = "run this task in the process of its flow, on a thread task runner"

_FLEET: ContextVar[tuple[ExecutionSpec, EngineFleet] | None] = ContextVar("engine_fleet", default=None)
_RUNNER: ContextVar[BundleRunner | None] = ContextVar("bundle_runner", default=None)


@contextmanager
def fleet_in_context(execution: ExecutionSpec, fleet: EngineFleet) -> Iterator[None]:
    """Let tasks that start in this block find the engines of an execution part."""
    token = _FLEET.set((execution, fleet))
    try:
        yield
    finally:
        _FLEET.reset(token)


@contextmanager
def runner_in_context(runner: BundleRunner) -> Iterator[None]:
    """Let tasks that start in this block find the runner of a plan's bundles."""
    token = _RUNNER.set(runner)
    try:
        yield
    finally:
        _RUNNER.reset(token)


def fleet_of(work: EngineWork) -> EngineFleet:
    """The engines that the flow around the caller has opened for this work.

    Raises:
        TerminalError: there are none: the task runs outside its flow, or in another process.
    """
    found = _FLEET.get()
    if found is None or found[0] != work.execution:
        raise TerminalError(f"no engines are open here: {_WHERE}")
    return found[1]


def runner_of(work: EngineWork) -> BundleRunner:
    """The runner that the flow around the caller has opened for this work.

    Raises:
        TerminalError: as `fleet_of`.
    """
    runner = _RUNNER.get()
    if runner is None or runner.work != work:
        raise TerminalError(f"no bundles are run here: {_WHERE}")
    return runner
