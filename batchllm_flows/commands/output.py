"""What commands print: results on standard output, logs on standard error."""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
import warnings
from typing import Any

import typer

from batchllm_flows.prefect_server import OUR_LOGGERS
from batchllm_operators.terminal import QUIET_VARIABLE

# Only what is not set already: who debugs a library sets its level. vLLM writes to the log files of its engines, which
# are kept where a run fails, and its records tell the phases of its start.
_QUIET = {
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "critical",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


class _WithoutTraceback(logging.Formatter):
    """Formats as another formatter does, but leaves tracebacks out: a person is told the cause in one line.

    Other handlers of the record, such as that of Prefect's server, still have them.
    """

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        shown = copy.copy(record)
        shown.exc_info = shown.exc_text = shown.stack_info = None
        return self._formatter.format(shown)


class _StandardError(logging.Handler):
    """Writes to what standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        typer.echo(self.format(record), err=True)


def set_up_logs(*, quiet: bool = False) -> None:
    """Let the steps tell how far they are; or keep every library of this process and its children silent.

    Call it before Prefect and transformers are imported: they read their settings then.

    Args:
        quiet: whether only the result and errors are shown.
    """
    if quiet:
        os.environ[QUIET_VARIABLE] = "1"
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        return
    for name in OUR_LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        # Once Prefect is imported, its handler of the root logger would print each line again.
        logger.propagate = False
        if not logger.handlers:
            handler = _StandardError()
            handler.setFormatter(_WithoutTraceback(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")))
            logger.addHandler(handler)


def hide_tracebacks() -> None:
    """Keep the tracebacks that Prefect logs of failed runs out of the terminal; call it when Prefect is imported."""
    for handler in logging.getLogger().handlers:
        if handler.formatter is not None and not isinstance(handler.formatter, _WithoutTraceback):
            handler.setFormatter(_WithoutTraceback(handler.formatter))


def print_result(values: dict[str, Any], markdown: str, *, as_json: bool) -> None:
    """Print a result: as JSON, or as Markdown, drawn where standard output is a terminal."""
    if as_json:
        typer.echo(json.dumps(values, indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(markdown))
    else:
        typer.echo(markdown, nl=False)
