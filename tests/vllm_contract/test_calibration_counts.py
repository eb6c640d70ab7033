"""What a calibration takes its engine to have done, against what vLLM's scheduler scheduled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.engine
def test_a_calibration_counts_tokens_and_steps_as_vllm_does(tiny_llama: str) -> None:
    script = Path(__file__).with_name("counting_engine.py")
    done = subprocess.run([sys.executable, script, tiny_llama], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["runs"]) >= 7
    for run in found["runs"]:
        assert run["taken"] == run["scheduled"]
    assert {run["taken"]["decode"] for run in found["runs"]} >= {0, 16, 8 * 16}
    # What a stalled engine would not show: every step but the last, in which the request leaves, adds its token.
    assert found["computed"][:-1] == list(range(40, 48))
    limits = found["limits"]
    assert limits["device"].startswith("1 x ")
    assert (limits["max_running_requests"], limits["max_request_tokens"]) == (32, 512)
    assert (limits["max_step_tokens"], limits["kv_capacity_tokens"] % 32) == (2048, 0)
    assert limits["vocabulary"] > 40_000
