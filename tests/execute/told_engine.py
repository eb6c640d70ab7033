"""An engine process without a model: its engine generates one token a step for each request, and does what it is told.

    python told_engine.py SETTINGS.json -P -m batchllm_operators.execute.engine_process --channel-fd 3 --parent-pid 4711

Settings: `capacity`, requests it holds; `step_seconds`; `poison`, a token on which the process is killed; `stuck`, a
token on which it steps for ever without computing; `submitted`, a file that gets a line for each request it takes;
`load_fault`, what it fails with instead of loading, after it has printed `prints`.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from batchllm_operators.execute.engine import Completion, EngineLimits, Request
from batchllm_operators.execute.engine_process import EngineProcess
from batchllm_operators.execute.messages import Load
from batchllm_operators.records import EngineSetting


class ToldEngine:
    def __init__(self, settings: dict[str, Any], load: Load) -> None:
        if fault := settings.get("load_fault"):
            print(settings["prints"])
            raise RuntimeError(fault)
        self.capacity: int = settings.get("capacity", 4)
        self.step_seconds: float = settings.get("step_seconds", 0.0)
        self.poison: int | None = settings.get("poison")
        self.stuck: int | None = settings.get("stuck")
        self.submitted: str | None = settings.get("submitted")
        self.held: list[Request] = []
        self.generated: dict[bytes, int] = {}
        self.computed_tokens = 0
        reason = load.attention_reason or "the job"
        self.settings = (EngineSetting(name="attention", value=load.model.attention, reason=reason),)
        self.limits = EngineLimits("1 x nothing", 5000, 100_000, self.capacity, 4096, 2048)

    @property
    def unfinished(self) -> int:
        return len(self.held)

    def submit(self, request: Request) -> Completion | None:
        if self.submitted:
            with Path(self.submitted).open("a") as log:
                log.write(f"{os.getpid()} {request.prompt_token_ids[-1]}\n")
        self.held.append(request)
        return None

    def step(self) -> list[Completion]:
        time.sleep(self.step_seconds)
        if any(self.poison in request.prompt_token_ids for request in self.held):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(self.stuck in request.prompt_token_ids for request in self.held):
            return []
        finished = []
        for request in list(self.held):
            tokens = self.generated[request.key] = self.generated.get(request.key, 0) + 1
            self.computed_tokens += 1
            if tokens >= request.sampling.max_tokens:
                self.held.remove(request)
                del self.generated[request.key]
                length = len(request.prompt_token_ids)
                finished.append(
                    Completion(
                        request.key, [1] * tokens, "text", "length", length, cached_tokens=0, completion_tokens=tokens
                    )
                )
        return finished

    def abort(self) -> None:
        self.held.clear()
        self.generated.clear()

    def close(self) -> None: ...


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    channel = socket.socket(fileno=int(sys.argv[sys.argv.index("--channel-fd") + 1]))
    channel.set_inheritable(False)
    process = EngineProcess(channel, lambda load: ToldEngine(settings, load))
    signal.signal(signal.SIGTERM, process.stop)
    process.serve()


if __name__ == "__main__":
    main()
