"""What a small job costs beside its model and its tokens: seconds from the shell, in turn with another commit.

    python benchmarks/startup.py --json --against HEAD~1

Three figures, each the median of the rounds:

- `plan_80_rows_s`: `batchllm plan` of 80 rows, from the shell and back.
- `run_overhead_s`: `batchllm run` of the same job, from the shell and back, less what its report says the engine took
  to load (importing vLLM is a part of that) and to compute.
- `floor_s`: what a run cannot do without, one thing after the other: the interpreter, the imports of Prefect and of our
  flows, Prefect's temporary server, one empty flow run on it, and the end of both. It is measured as a program that
  does just that. The engine loads beside all of it, so that the overhead may be below this floor; the wall seconds of
  a run cannot be, however fast its model loads.

The model is a random one of two layers with SmolLM2's tokenizer, in float32 and eager, unless `--model` names another.
Every call is a process of its own with an output folder of its own; caches of earlier runs (compiled planner, Prefect's
database) are warm: one round before the first is not counted. `--against` runs a worktree of another commit in the same
environment, in turn with this one. Nothing is reported unless every run answered every row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.documents import questions
from benchmarks.engine_arguments import models_folder

REPOSITORY = Path(__file__).parent.parent
ROWS = 80
FIGURES = ("plan_80_rows_s", "run_overhead_s", "floor_s")
LOG_CHARACTERS = 3000
_COMMAND = "from batchllm_flows.cli import main; main()"
_EMPTY_FLOW = """
import os
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
from batchllm_flows import flows
from prefect import flow
flow(lambda: None, name="empty")()
"""


class Startup:
    """Calls of one checkout of this repository.

    Args:
        root: the checkout.
        folder: for inputs, outputs and logs; made if need be.
        job: the job's values, without its sink.
    """

    def __init__(self, root: Path, folder: Path, job: dict[str, Any]) -> None:
        self._folder = folder
        self._job = job
        self._calls = 0
        paths = [root, root / "operators", root / "kernels"]
        self._root = root
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PREFECT_HOME": str(folder / "prefect"),
            "HF_HUB_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }
        folder.mkdir(parents=True, exist_ok=True)

    def measure(self) -> dict[str, float]:
        """One round: each figure once."""
        wall, _ = self._batchllm("plan")
        run_wall, report = self._batchllm("run")
        floor, _ = self._seconds([sys.executable, "-c", _EMPTY_FLOW])
        return {"plan_80_rows_s": wall, "run_overhead_s": overhead_seconds(run_wall, report), "floor_s": floor}

    def _batchllm(self, command: str) -> tuple[float, dict[str, Any]]:
        self._calls += 1
        job_file = self._folder / f"job-{self._calls}.yaml"
        job = self._job | {"sink": {"uri": str(self._folder / f"answers-{self._calls}")}}
        job_file.write_text(yaml.safe_dump(job), encoding="utf-8")
        seconds, printed = self._seconds([sys.executable, "-c", _COMMAND, command, str(job_file), "--json"])
        told: dict[str, Any] = json.loads(printed)
        return seconds, told

    def _seconds(self, command: list[str]) -> tuple[float, str]:
        started = time.perf_counter()
        done = subprocess.run(
            command, cwd=self._root, env=self._environment, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"expected exit code 0, got {done.returncode}:\n{done.stderr[-LOG_CHARACTERS:]}")
        return seconds, done.stdout


def overhead_seconds(wall: float, report: dict[str, Any]) -> float:
    """What a run took beside loading the model and computing.

    Args:
        wall: of the command.
        report: that it printed.

    Raises:
        SystemExit: a row has no answer, or the run computed nothing: there is no figure.
    """
    if report["rows_out"] != ROWS or report["rows_error"] or not report["computed_requests"]:
        raise SystemExit(f"wrong result, nothing is reported: expected {ROWS} answers, got {report}")
    return wall - float(report["engine_load_seconds"]) - float(report["forecast"]["execute_seconds"]["actual"])


def small_job(folder: Path, model: str, dtype: str) -> dict[str, Any]:
    """A job of 80 questions about documents, without its sink; its input is written to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(questions(ROWS), folder / "questions.parquet")
    return {
        "name": "startup",
        "source": {"uri": str(folder / "questions.parquet"), "format": "parquet", "id_column": "id"},
        "prompt": {"kind": "chat", "system": "{{ document }}", "user": "{{ question }}"},
        "model": {
            "id": model,
            "dtype": dtype,
            "max_model_len": 1024,
            "engine_args": {"enforce_eager": True, "num_gpu_blocks_override": 512, "max_num_seqs": 16},
        },
        "sampling": {"max_tokens": 6},
        "execution": {"calibrate": False},
    }


def medians_in_turn(
    measures: dict[str, Callable[[], dict[str, float]]], rounds: int, tell: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """The median of each figure, for each of several measures that take turns; a first round is not counted."""
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in measures}
    names = list(measures)
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            figures = measures[name]()
            if number:
                measured[name].append(figures)
            warm_up = "" if number else " (not counted)"
            tell(f"round {number}{warm_up}, {name}: " + ", ".join(f"{key} {figures[key]:.1f}" for key in figures))
    return {
        name: {key: round(statistics.median(one[key] for one in taken), 2) for key in taken[0]}
        for name, taken in measured.items()
    }


def measure_startup(folder: Path, model: str, dtype: str, rounds: int) -> dict[str, float]:
    """The figures of this checkout, for other benchmarks."""
    here = Startup(REPOSITORY, folder / "here", small_job(folder, model, dtype))
    return medians_in_turn({"here": here.measure}, rounds, _tell)["here"]


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """A checkout of another commit, which goes when the block ends."""
    place = folder / "worktree"
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(place), commit], check=True)
    try:
        yield place
    finally:
        subprocess.run([*git, "remove", "--force", str(place)], check=True)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", metavar="GIT_REF", help="commit to run in turn with this checkout")
    parser.add_argument("--model", help="folder or Hugging Face id; default: a random one of two layers")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error("--rounds: expected 1 or more")
    model = given.model
    if model is None:
        from batchllm_flows.demo.model import tiny_llama_folder

        model = str(tiny_llama_folder(models_folder()))
    with tempfile.TemporaryDirectory(prefix="batchllm-startup-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if given.against is None:
            result: dict[str, Any] = dict(measure_startup(folder, model, given.dtype, given.rounds))
        else:
            job = small_job(folder, model, given.dtype)
            with worktree(given.against, folder) as other:
                measures = {
                    "here": Startup(REPOSITORY, folder / "here", job).measure,
                    given.against: Startup(other, folder / "against", job).measure,
                }
                medians = medians_in_turn(measures, given.rounds, _tell)
            result = medians["here"] | {"against": {"commit": given.against} | medians[given.against]}
    if given.json:
        print(json.dumps(result))
        return
    for name in FIGURES:
        other_figure = f"   {given.against}: {result['against'][name]:.2f}" if given.against else ""
        print(f"{name:<16}{result[name]:>8.2f}{other_figure}")


if __name__ == "__main__":
    main()
