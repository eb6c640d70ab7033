"""What runs where the engine is, at the moments that a driver does not see."""

from __future__ import annotations

from typing import Any

import pytest

from batchllm_operators.errors import EngineDiedError, TerminalError
from batchllm_operators.execute.backends.base import Place
from batchllm_operators.execute.backends.inline import InlineBackend, Script, ScriptedMaker
from batchllm_operators.execute.engine import Request
from batchllm_operators.execute.messages import Event, Load, Started
from batchllm_operators.execute.worker import EngineLoop
from batchllm_operators.specs.execution import ModelSpec
from tests.execute.engines import started_engine

LOAD = Load(model=ModelSpec(id="m"), block_size=32, gpus=1, task="generate")


class AbandonedError(Exception):
    """Takes the place of the end of a process."""


def abandon() -> None:
    raise AbandonedError


class StoppedLoop(EngineLoop):
    """Is told to stop between taking the command to load and loading."""

    def _load(self, command: Load) -> None:
        self.stop()
        super()._load(command)


def test_a_stop_that_comes_just_before_a_load_ends_it() -> None:
    sent: list[Event] = []
    loop = StoppedLoop(sent.append, ScriptedMaker(Script()), on_abandon=abandon)
    loop.take(LOAD)
    loop.serve()
    assert isinstance(sent[0], Started)
    assert not any(event.kind == "loaded" for event in sent)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (TerminalError("task 'x' failed on an output"), TerminalError, "^task 'x' failed on an output"),
        (RuntimeError("CUDA error"), EngineDiedError, "^the engine broke: RuntimeError: CUDA error"),
    ],
)
def test_a_fault_that_would_come_again_on_every_engine_costs_no_other_engine(
    work: Any, fault: Exception, kind: type[Exception], message: str
) -> None:
    def answer(_request: Request) -> str:
        raise fault

    def maker(_place: Place) -> ScriptedMaker:
        return ScriptedMaker(Script(answer=answer))

    with started_engine(InlineBackend(1, maker)) as engine:
        engine.driver.load(LOAD)
        with pytest.raises(kind, match=message):
            engine.run(work.run_command(work.write_bundle()))
