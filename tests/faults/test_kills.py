"""A short form of the kills of `benchmarks.faults`: nothing is lost, twice, wrong or left behind."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from prefect.settings import get_current_settings

from batchllm_operators.temporary_folders import abandoned_folders
from benchmarks.fault_kills import FIGURES, Kills, real_kills, scripted_kills

ROWS = 60
PART_ROWS = 20
"""Answers that may not be written yet when a run is killed."""


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(("kind", "count"), [(scripted_kills, 4), (real_kills, 1)])
def test_killed_runs_leave_nothing_wrong(
    kind: Callable[[Path, str, int], Kills],
    count: int,
    tiny_llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = get_current_settings().api.url
    assert url is not None
    monkeypatch.setenv("PREFECT_API_URL", url)  # for the processes of the runs
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = kind(tmp_path / "job", tiny_llama, ROWS).measure(count, random.Random(5))
    assert found["kills"] == count
    assert {name: found[name] for name in FIGURES} == dict.fromkeys(FIGURES, 0)
    assert found.get("recomputed_share_max", 0) <= PART_ROWS / ROWS
    assert abandoned_folders() == []
