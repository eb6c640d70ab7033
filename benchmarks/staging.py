"""Staging with several numbers of tokenizer processes: rows a second, start included and left out.

Every run has a process of its own; the runs alternate, and the medians of all repeats are printed. Refuses to report
where two runs staged different bytes.

    python benchmarks/staging.py --model path/or/id [--rows 20000] [--processes 1 2] [--repeats 3] [--json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa

from batchllm_operators.formats import open_source
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.sampling import SamplingSpec
from batchllm_operators.specs.source import ChatPrompt, SourceSpec
from batchllm_operators.stage.progress import StageStep
from batchllm_operators.stage.staging import stage_rows
from batchllm_operators.stage.tokenizer_pool import available_cores
from batchllm_operators.store import Store

TEXT = (
    "a batch of requests shares its beginning with others and the engine computes it once if all of them come together"
    " while the cache still holds what they have in common so their order decides how much work is left"
)


def write_input(folder: str, rows: int, words: int) -> None:
    chance = np.random.default_rng(0)
    known = TEXT.split()
    texts = [" ".join(known[number] for number in chance.integers(0, len(known), words)) for _ in range(rows)]
    Store(folder).write_table("input.parquet", pa.table({"text": texts}))


def run(folder: str, model: str, processes: int) -> dict[str, Any]:
    """Stage in this process; rows a second over all, and from the first batch on."""
    started = time.monotonic()
    times: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory(prefix="batchllm-staging-") as target:
        work = Store(target)
        summary = stage_rows(
            open_source(SourceSpec(uri=f"{folder}/input.parquet", format="parquet")),
            ChatPrompt(kind="chat", system="You answer in one word.", user="{{ text }}\n\nIs that so?"),
            SamplingSpec(),
            ModelSpec(id=model),
            work,
            tokenizer_processes=processes,
            progress=lambda step, rows: times.append((time.monotonic(), rows)) if step is StageStep.STAGE else None,
        )
        digest = hashlib.blake2b(b"".join(work.read_bytes(part.name) for part in summary.parts)).hexdigest()
    (first, first_rows), (last, last_rows) = times[0], times[-1]
    return {
        "processes": processes,
        "rows": summary.rows,
        "tokens": summary.prompt_tokens,
        "seconds": time.monotonic() - started,
        "start_seconds": first - started,
        "rows_per_second": (last_rows - first_rows) / (last - first),
        "digest": digest,
    }


def benchmark(model: str, rows: int, words: int, processes: list[int], repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="batchllm-staging-") as folder:
        write_input(folder, rows, words)
        runs = [_in_process(folder, model, count) for _ in range(repeats) for count in processes]
    if len({one["digest"] for one in runs}) != 1:
        raise SystemExit("wrong result: the number of processes changes what is staged")
    figures = ("seconds", "start_seconds", "rows_per_second")
    medians = []
    for count in processes:
        own = [one for one in runs if one["processes"] == count]
        medians.append(
            {"processes": count} | {name: round(statistics.median(r[name] for r in own), 2) for name in figures}
        )
    return {"rows": rows, "tokens": runs[0]["tokens"], "cores": available_cores(), "repeats": repeats, "runs": medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face id, or the path of a folder in that layout")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--words", type=int, default=200, help="of each row")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--run", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(options.run, options.model, options.processes[0])))
        return
    result = benchmark(options.model, options.rows, options.words, options.processes, options.repeats)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for one in result["runs"]:
        print("  ".join(f"{name} {value}" for name, value in one.items()))


def _in_process(folder: str, model: str, processes: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", folder, "--model", model, "--processes", str(processes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main()
