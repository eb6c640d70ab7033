"""A worker process with one loaded engine (`engine_worker.py`), as its parent sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

STOCK = "vllm"
"""Name of vLLM's own scheduler."""


class EngineProcess:
    """Runs orders one after the other; a context manager, whose end is that of the process.

    Args:
        arguments: vLLM's `EngineArgs`.
        schedulers: as for `engine_worker.Worker`.
        log: file for what the engine prints.
        attention: as `model.attention` of a job.
        environment: variables of the process, beside those of this one.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        schedulers: dict[str, dict[str, Any] | None],
        log: Path,
        *,
        attention: str = "stock",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        settings = json.dumps({"arguments": arguments, "schedulers": schedulers, "attention": attention})
        self._log = log
        with log.open("a") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("engine_worker.py")), settings],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})},
            )
        self.settings = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def run(self, order: dict[str, Any], scheduler: str = STOCK) -> dict[str, Any]:
        """What `engine_worker.Worker.run` returns for an order."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(order | {"scheduler": scheduler}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the engine died:\n{self._log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer
