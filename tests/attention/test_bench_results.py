"""Files of results: a run that is cut off loses nothing, and the next one goes on; the script and its summary."""

from __future__ import annotations

import importlib.util
import json
import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from batchllm_kernels.bench.grid import GridPoint
from batchllm_kernels.bench.ours import SHARED, UNSHARED
from batchllm_kernels.bench.report import goals, missed_points, summary
from batchllm_kernels.bench.results import Deadline, ResultsFile, Scope, read_rows
from batchllm_kernels.bench.rivals import FLASH_ATTENTION_3

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
STAGES = (
    "facts",
    "check",
    "host",
    "memcheck",
    "racecheck",
    "time-important",
    "calibrate",
    "compile_candidates",
    "tune",
)


def test_results_are_kept_and_a_second_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    asked = []

    def result(key: str) -> dict[str, Any]:
        asked.append(key)
        if key == "b" and len(asked) == 2:
            raise RuntimeError("once")
        return {"value": key.upper()}

    first = ResultsFile(path, "time")
    assert not first.collect(["a", "b", "c"], result, Scope())
    assert first.failures == 1
    assert [row["key"] for row in first.rows()] == ["a", "c"]
    assert {"stage": "time", "key": "b", "failed": "RuntimeError: once"} in read_rows(path)
    assert ResultsFile(path, "time").collect(["a", "b", "c"], result, Scope())
    assert asked == ["a", "b", "c", "b"]
    assert read_rows(path)[-1] == {"stage": "time", "complete": True}


def test_a_line_that_was_cut_off_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = ResultsFile(path, "time")
    results.add("a", value=1)
    with path.open("a") as file:
        file.write('{"stage": "time", "key": "b", "val')
    results.add("c", value=3)
    assert [row["key"] for row in results.rows()] == ["a", "c"]


def test_nothing_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "results.jsonl", "time")
    assert not results.collect(["a"], lambda _: {}, Scope(deadline=Deadline(0)))
    assert results.rows() == []


def test_a_stage_is_complete_when_the_parts_of_all_processes_are_there(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    keys = ["a", "b", "c"]
    assert not ResultsFile(path, "check").collect(keys, lambda _: {}, Scope(part=(1, 2)))
    assert [row["key"] for row in ResultsFile(path, "check").rows()] == ["b"]
    assert ResultsFile(path, "check").collect(keys, lambda _: {}, Scope(part=(0, 2)))
    assert read_rows(path)[-1] == {"stage": "check", "complete": True}


def test_without_a_file_results_are_printed_and_known_to_other_stages(capsys: pytest.CaptureFixture[str]) -> None:
    facts = ResultsFile(None, "facts")
    facts.add("copy", bytes_per_second=3e12)
    assert json.loads(capsys.readouterr().out)["bytes_per_second"] == 3e12
    assert facts.of_stage("time").rows() == []
    assert facts.of_stage("time").of_stage("facts").rows()[0]["key"] == "copy"


def timed(prefix: int, degree: int, gain: float, own: float = 2.5e12, *, shuffled: bool = False) -> dict[str, Any]:
    point = GridPoint(prefix, degree, shuffled=shuffled)
    return {
        "stage": "time",
        "key": point.key,
        "point": {name: getattr(point, name) for name in point.__dataclass_fields__},
        "microseconds": {SHARED: 100.0, UNSHARED: 300.0, FLASH_ATTENTION_3: 100.0 * gain},
        "flash_attention_3_over_ours": gain,
        "own_bytes_per_second": own,
        "share_of_copy_bandwidth": 0.8,
        "relative_error": 0.004,
    }


def test_the_points_that_miss_their_goal_by_most_come_first() -> None:
    rows = [
        timed(2000, 16, 1.6), timed(16000, 64, 2.0), timed(256, 16, 0.9), timed(2000, 16, 1.2, shuffled=True),
        timed(2000, 1, 1.0, own=2.0e12),
    ]  # fmt: skip
    assert {(goal.expected, goal.got) for goal in goals(rows[:1])} == {(1.5, 1.6), (2.4e12, 2.5e12)}
    missed = [(point.prefix, point.degree) for point in missed_points(rows, most=4)]
    assert missed == [(16000, 64), (2000, 1), (256, 16)]
    assert len(missed_points(rows, most=2)) == 2


def test_the_summary_has_the_table_the_goals_and_the_failures(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    rows = [
        timed(2000, 16, 1.6),
        timed(16000, 64, 2.0),
        {"stage": "check", "key": "odd", "failed": "WrongResultError: off"},
        {"stage": "time", "complete": True},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = summary(path)
    assert "time: 2 results, complete" in text
    assert "check: 0 results, with failures" in text
    assert "FAILED odd: WrongResultError: off" in text
    assert "met    gain over FlashAttention 3: 1.6 of 1.5" in text
    assert "MISSED gain over FlashAttention 3: 2 of 4" in text


def check(out: Path, seconds: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "REHEARSAL": "1", "PYTHON": sys.executable}
    environment.pop("BATCHLLM_FA3_LIBRARY", None)
    command = ["bash", str(SCRIPT), str(out), str(seconds)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)


def test_the_script_skips_what_is_complete_and_measures_the_rest(tmp_path: Path) -> None:
    complete = [*STAGES[1:], "replay", "profile", "time"]
    lines = [json.dumps({"stage": stage, "complete": True}) for stage in complete]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    done = check(tmp_path, 600)
    assert done.returncode == 0, done.stderr
    for stage in complete:
        assert f"{stage}: complete before" in done.stdout
    assert "facts: 3 results, complete" in (tmp_path / "summary.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "summary.txt", "log.txt"}


def test_the_script_begins_nothing_for_which_no_time_is_left(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("")
    done = check(tmp_path, 1)
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        assert f"{stage}: no time left" in done.stdout


def fa3_library() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fa3_library", ROOT / "scripts" / "fa3_library.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_library_is_taken_out_of_a_wheel_and_compressed(tmp_path: Path) -> None:
    script = fa3_library()
    wheel, target = tmp_path / "vllm.whl", tmp_path / "fa3.xz"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(script.MEMBER, b"machine code " * 1000)
    assert script.main([str(wheel), str(target)]) == 0
    assert lzma.decompress(target.read_bytes()) == b"machine code " * 1000
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/other.py", b"")
    with pytest.raises(KeyError, match="_vllm_fa3_C"):
        script.main([str(wheel), str(target)])
    assert script.main([str(wheel)]) == 2
