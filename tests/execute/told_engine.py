"""An engine process without a model, whose scripted engine does what it is told.

    python told_engine.py SETTINGS.json -P -m batchllm_operators.execute.backends.local_worker --channel-fd 3 ...

Settings: those of `Script` by name, and besides `submitted`, a file that gets a line for each request the engine takes;
`load_fault`, the message of the error that loading fails with, after the engine has printed `prints`.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchllm_operators.execute.backends.inline import Script, ScriptedEngine, ScriptedMaker
from batchllm_operators.execute.backends.local_worker import main
from batchllm_operators.execute.engine import Request
from batchllm_operators.execute.messages import Load


@dataclass(frozen=True)
class PrintingMaker(ScriptedMaker):
    prints: str = ""

    def load(self, command: Load) -> ScriptedEngine:
        print(self.prints)
        return super().load(command)


def told_maker(settings: dict[str, Any]) -> PrintingMaker:
    """The maker of a process that is really killed where its script says so."""
    settings = dict(settings)
    prints, submitted = settings.pop("prints", ""), settings.pop("submitted", None)
    if fault := settings.pop("load_fault", None):
        settings["load_fault"] = RuntimeError(fault)

    def log(request: Request) -> None:
        with Path(submitted).open("a") as file:
            file.write(f"{os.getpid()} {request.prompt_token_ids[-1]}\n")

    if submitted:
        settings["on_submit"] = log
    return PrintingMaker(Script(**settings), die=lambda: os.kill(os.getpid(), signal.SIGKILL), prints=prints)


if __name__ == "__main__":
    main(told_maker(json.loads(Path(sys.argv[1]).read_text())), sys.argv[sys.argv.index("-m") + 2 :])
