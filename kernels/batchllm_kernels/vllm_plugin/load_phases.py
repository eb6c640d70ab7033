"""Tells which phase of its start vLLM is in, through a small file that all its processes append to.

vLLM has no hook for this. Its loggers are named after the modules that do the work, so a handler on them knows the
phase by the name of the logger, whatever the message says. vLLM calls `register` of its plugins in each of its
processes, which installs the handler. Where vLLM's logging is switched off the file stays empty, and nothing else
changes.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

LOAD_PHASE_VARIABLE = "BATCHLLM_LOAD_PHASES"
"""Environment variable with the file that gets a line for each phase that begins."""

WEIGHTS = "weights"
COMPILATION = "compilation"
KV_CACHE = "KV cache"

MODULES = {
    "vllm.model_executor.model_loader": WEIGHTS,
    "vllm.compilation": COMPILATION,
    "vllm.v1.core.kv_cache_utils": KV_CACHE,
}
"""The phase that a logger of this name, or below it, belongs to."""

FUNCTIONS = {
    "load_model": WEIGHTS,
    "warming_up_model": COMPILATION,
    "compile_or_warm_up_model": COMPILATION,
    "capture_model": COMPILATION,
}
"""The phase that a function of vLLM's workers belongs to, where one module does several things."""

WORKERS = "vllm.v1.worker"
"""The package that these functions are in."""


class PhaseHandler(logging.Handler):
    """Appends the phase to a file when a record shows that another one has begun.

    Args:
        file: the file to append to; it is created, and several processes may append to it.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file
        self._phase: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Append the phase of a log record of vLLM, where it is another phase than before."""
        phase = phase_of(record)
        if phase is None or phase == self._phase:
            return
        self._phase = phase
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{phase}\n")
        except OSError:
            self.handleError(record)


def phase_of(record: logging.LogRecord) -> str | None:
    """The phase that a log record belongs to; None where its logger belongs to none."""
    if record.name.startswith(WORKERS):
        return FUNCTIONS.get(record.funcName)
    names = (name for name in MODULES if record.name == name or record.name.startswith(f"{name}."))
    return next((MODULES[name] for name in names), None)


def watch_loading() -> None:
    """Install the handler on vLLM's loggers, once in each process, where the environment names a file."""
    file = os.environ.get(LOAD_PHASE_VARIABLE)
    logger = logging.getLogger("vllm")
    if file and not any(isinstance(handler, PhaseHandler) for handler in logger.handlers):
        logger.addHandler(PhaseHandler(Path(file)))


def last_phase(file: Path) -> str | None:
    """The phase that began last; None before the first."""
    if not file.exists():
        return None
    lines = file.read_text(encoding="utf-8").splitlines()
    return lines[-1] if lines else None
