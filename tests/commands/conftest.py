"""The commands in this process, each with an environment and a logging of its own."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
from typer.testing import CliRunner, Result

Batchllm = Callable[..., Result]


@pytest.fixture
def batchllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Batchllm]:
    """Runs one command line; its result has `exit_code`, `stdout` and `stderr`."""
    from batchllm_flows.cli import app
    from batchllm_flows.commands import job_files, jobs

    for module in (jobs, job_files):
        # It is for a whole process, and others of this one's tests need torch.
        monkeypatch.setattr(module, "leave_out_torch", lambda _model: None)
    ours = [logging.getLogger(name) for name in ("batchllm_flows", "batchllm_operators")]
    with mock.patch.dict(os.environ), warnings.catch_warnings():
        yield lambda *arguments: CliRunner().invoke(app, [str(one) for one in arguments])
    logging.disable(logging.NOTSET)
    for logger in ours:
        logger.propagate = True
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
