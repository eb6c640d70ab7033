"""The table of upstream symbols names tests that exist, and every contract test of the plugin stands in it."""

from __future__ import annotations

import re
from pathlib import Path

ROOM = Path(__file__).parent
TABLE = ROOM.parent.parent / "kernels" / "batchllm_kernels" / "vllm_plugin" / "README.md"


def test_every_symbol_of_vllm_is_guarded_by_a_test_that_exists() -> None:
    named = set(re.findall(r"`(test_\w+)` \|", TABLE.read_text()))
    defined = {
        name for file in ROOM.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert named <= defined
    for file in ("test_scheduler_symbols.py", "test_attention_symbols.py"):
        assert set(re.findall(r"^def (test_\w+)", (ROOM / file).read_text(), re.M)) <= named, file
