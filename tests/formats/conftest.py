"""The formats that are built in, and one from outside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchllm_operators.formats import register_format, unregister_format
from tests.formats.tabbed import TABBED


@pytest.fixture
def tabbed() -> Iterator[None]:
    """The format `tabbed`, registered in this process as long as a test runs."""
    register_format(TABBED)
    yield
    unregister_format("tabbed")
