"""The formats that are built in, and one from outside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchllm_operators.formats import register_format, unregister_format
from tests.formats.tsv import TSV


@pytest.fixture
def tsv() -> Iterator[None]:
    """The format `tsv`, registered in this process as long as a test runs."""
    register_format(TSV)
    yield
    unregister_format("tsv")
