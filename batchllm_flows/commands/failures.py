"""How a command ends that fails: one line on standard error with cause and next step, and the documented exit code."""

from __future__ import annotations

import sys
import traceback
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from batchllm_flows.job import InvalidJobError
from batchllm_operators.errors import BatchLLMError, TransientError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_ROW_ERRORS = 3
EXIT_INTERRUPTED = 130

DEBUG_OPTION = "--debug"

# The base of typer's own errors of usage, which say and end as they should already.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class CommandGroup(TyperGroup):
    """All commands: `--debug` is taken anywhere on the line, and no exception of a command reaches the user raw."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move `--debug` before the command, where it belongs."""
        if DEBUG_OPTION in args:
            args = [DEBUG_OPTION, *(one for one in args if one != DEBUG_OPTION)]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and end as its exception asks for."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except _UsageError as error:
            usage: Any = error
            command = "" if usage.ctx is None or usage.ctx is ctx else f"{usage.ctx.info_name} "
            fail(f"{one_line(usage.format_message()).rstrip('.')}; see batchllm {command}--help", EXIT_USAGE)
        except (Exception, KeyboardInterrupt) as error:
            debug = debugging(ctx)
            if debug:
                typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)
            message, code = explained(error, debug=debug)
            fail(message, code)


def debugging(ctx: typer.Context) -> bool:
    """Whether the line of a command asks for tracebacks."""
    return bool(ctx.find_root().params.get("debug"))


def explained(error: BaseException, *, debug: bool = False) -> tuple[str, int]:
    """What to tell of an exception, in one line, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what is done is kept: give the same command again to go on", EXIT_INTERRUPTED
    if isinstance(error, BatchLLMError):
        again = "; run again, and look at the address if it stays so" if isinstance(error, TransientError) else ""
        return one_line(f"{error}{again}"), EXIT_USAGE if isinstance(error, InvalidJobError) else EXIT_FAILED
    if _is_http_error(error):
        return (
            f"Prefect's server does not answer any more ({type(error).__name__}); what is done is kept: run again, "
            "with PREFECT_API_URL of a server that lasts, if need be",
            EXIT_FAILED,
        )
    advice = "" if debug else f"; run with {DEBUG_OPTION} for the traceback"
    reason = str(error).strip()
    return one_line(f"{type(error).__name__}{': ' if reason else ''}{reason}{advice}"), EXIT_FAILED


def _is_http_error(error: BaseException) -> bool:
    """Whether it is of the client of Prefect's server; a store's errors are told as such."""
    httpx = sys.modules.get("httpx")  # loaded with Prefect, and not for this
    return httpx is not None and isinstance(error, httpx.HTTPError)


def one_line(text: str) -> str:
    """A text whose line breaks are spaces."""
    return " ".join(piece.strip() for piece in text.splitlines() if piece.strip())


def fail(message: str, code: int) -> NoReturn:
    """End the command with a line on standard error."""
    typer.echo(f"batchllm: {message}", err=True)
    raise typer.Exit(code)
