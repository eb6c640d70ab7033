"""Imports that a run needs soon, done while it waits for something else."""

from __future__ import annotations

from contextlib import suppress
from threading import Thread


def import_steps_ahead() -> None:
    """Begin to import what staging and planning need, in a thread; none of it imports Prefect.

    To be called where the caller is going to wait for another process: Prefect's temporary server takes seconds.
    """
    Thread(target=_import_steps, name="imports-ahead").start()


def _import_steps() -> None:
    # What is missing is told by the step that needs it, which imports it again.
    with suppress(ImportError):
        import transformers

        import batchllm_operators.plan.step
        import batchllm_operators.stage.step  # noqa: F401 - imported for those who need it later

        # transformers loads these when they are asked for.
        _ = transformers.AutoConfig, transformers.AutoTokenizer
