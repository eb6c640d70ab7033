"""What faults cost: runs that are killed, a store that fails, inputs that are broken.

    python -m benchmarks.faults [--kills 20] [--storage-faults 500] [--malformed 60] [--seed 1] [--json]

- Kills: a job of 240 requests on a scripted engine runs in a process group that is killed (SIGKILL) at a moment drawn
  from the time of an undisturbed run, again and again, until so many kills are done; whenever a run completes, its
  output is held against that of the undisturbed run, and the next job begins. One Prefect server serves all.
- Storage: the job runs on rclone's S3 server behind `fault_proxy`, where a tenth of the requests fail, until so many
  faults have been met.
- Malformed: job files and input objects with bytes changed, cut or doubled by the seed go through `batchllm validate`
  and `batchllm plan`: each must end with a documented exit code and, where it fails, one line.

`recomputed_share_max` is the largest share of a job's requests that one kill let be answered again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchllm_flows import BatchJob, batch_inference
from batchllm_flows.demo.model import tiny_llama_folder
from batchllm_flows.demo.s3_server import serve_s3
from batchllm_operators.errors import BatchLLMError
from batchllm_operators.merge.claim import IN_PROGRESS_FILE
from batchllm_operators.merge.sink import read_manifest
from batchllm_operators.store import Store
from batchllm_operators.work.layout import LEASE_FILE
from benchmarks.fault_proxy import FaultProxy
from benchmarks.faults_run import register_scripted

ROWS = 240
STEP_SECONDS = 0.02
EXIT_CODES = (0, 1, 2, 3)
COMMAND = (sys.executable, "-c", "from batchllm_flows.cli import main; main()")


def rows(count: int = ROWS) -> pa.Table:
    """Questions over a few documents."""
    numbers = range(count)
    return pa.table(
        {
            "id": [f"row-{n}" for n in numbers],
            "text": [f"Document {n % 6}: " + "the river runs north. " * 20 + f"What of {n}?" for n in numbers],
        }
    )


def job(source: str, sink: str, model: str, storage: dict[str, Any] | None = None) -> dict[str, Any]:
    """The job, as JSON values."""
    return {
        "name": "faults",
        "source": {"uri": source, "format": "parquet", "id_column": "id", "storage": storage or {}},
        "prompt": {"kind": "column", "column": "text"},
        "model": {"id": model, "max_model_len": 2048},
        "sampling": {"max_tokens": 4},
        "execution": {
            "backend": "scripted", "calibrate": False, "part_rows": 20, "part_seconds": 0.5, "reuse": "none",
        },
        "sink": {"uri": sink, "mode": "overwrite", "storage": storage or {}},
    }  # fmt: skip


def output(sink: Store) -> pa.Table:
    """The rows of a complete output."""
    manifest = read_manifest(sink)
    if manifest is None:
        raise TypeError(f"{sink.uri}: expected a complete output")
    tables = []
    for file in manifest.files:
        with sink.parquet(file.name) as opened:
            tables.append(opened.read())
    return pa.concat_tables(tables)


def differences(expected: pa.Table, found: pa.Table) -> Counter[str]:
    """Rows that are lost, there twice, or have another answer."""
    answers = {row["id"]: row["completion"] for row in expected.to_pylist()}
    seen = Counter(found["id"].to_pylist())
    return Counter(
        rows_lost=sum(name not in seen for name in answers),
        rows_twice=sum(count > 1 for count in seen.values()),
        rows_wrong=sum(answers.get(row["id"]) != row["completion"] for row in found.to_pylist()),
    )


def kills(count: int, chance: random.Random, folder: Path, model: str) -> dict[str, Any]:
    """Kill runs of the job, and hold what comes out against an undisturbed run."""
    pq.write_table(rows(), folder / "in.parquet")
    log = folder / "answered"
    totals: Counter[str] = Counter(rows_lost=0, rows_twice=0, rows_wrong=0, orphans=0, leftover_files=0)
    share = 0.0

    def start(name: str) -> subprocess.Popen[bytes]:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(job(str(folder / "in.parquet"), str(folder / name), model)))
        arguments = [sys.executable, "-m", "benchmarks.faults_run", str(path), str(log), str(STEP_SECONDS)]
        log_file = (folder / "log").open("ab")
        return subprocess.Popen(arguments, stdout=log_file, stderr=log_file, start_new_session=True)

    began = time.monotonic()
    if start("undisturbed").wait() != 0:
        raise SystemExit(f"the undisturbed run failed, see {folder / 'log'}")
    seconds, expected = time.monotonic() - began, output(Store(str(folder / "undisturbed")))
    requests, done, number = len(log.read_text().splitlines()), 0, 0
    while done < count:
        name, number = f"job-{number}", number + 1
        log.write_text("")
        killed = 0
        while True:
            before = Counter(log.read_text().splitlines())
            run = start(name)
            is_last = done >= count
            try:
                run.wait(None if is_last else chance.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
                done, killed = done + 1, killed + 1
            answered = Counter(log.read_text().splitlines()) - before
            share = max(share, sum(count for key, count in answered.items() if key in before) / requests)
            if run.returncode == 0:
                break
        totals += Counter() | differences(expected, output(Store(str(folder / name))))
        left = [path for path in (folder / name).rglob("*") if path.name.startswith(".partial-")]
        left += [path for path in [folder / name / IN_PROGRESS_FILE] if path.exists()]
        left += list((folder / name).rglob(LEASE_FILE))
        totals["leftover_files"] += len(left)
    totals["orphans"] += sum(b"benchmarks.faults_run" in command for command in _commands())
    named = {name: totals[name] for name in ("rows_lost", "rows_twice", "rows_wrong", "orphans", "leftover_files")}
    return {"kills": done, "jobs": number, "requests": requests, "recomputed_share_max": round(share, 4), **named}


def _commands() -> Iterator[bytes]:
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield file.read_bytes()
        except OSError:
            continue  # it has ended meanwhile


def storage(count: int, seed: int, folder: Path, model: str) -> dict[str, Any]:
    """Run the job on a failing store until so many faults have been met."""
    import s3fs

    register_scripted(folder / "answered-storage")
    met, failed, number = 0, 0, 0
    totals: Counter[str] = Counter()
    with serve_s3(folder / "buckets") as server:
        os.environ.update(server.environment())
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        Store("s3://bucket/in").write_table("rows.parquet", rows())
        batch_inference(BatchJob.model_validate(job("s3://bucket/in/", "s3://bucket/undisturbed", model)))
        expected = output(Store("s3://bucket/undisturbed"))
        while met < count:
            number += 1
            with FaultProxy(server.endpoint_url, rate=0.1, seed=seed + number, lag_seconds=2.0) as proxy:
                values = job("s3://bucket/in/", f"s3://bucket/out-{number}", model, {"endpoint_url": proxy.url})
                values["execution"]["part_rows"] = 2
                try:
                    batch_inference(BatchJob.model_validate(values))
                except BatchLLMError as error:
                    print(f"job {number}: {error}", file=sys.stderr)
                    failed += 1
                met += proxy.faults.total()
            totals += differences(expected, output(Store(f"s3://bucket/out-{number}")))
    return {"storage_faults": met, "jobs": number, "jobs_failed_by_faults": failed, "rows_differing": totals.total()}


def malformed(count: int, chance: random.Random, folder: Path, model: str) -> dict[str, Any]:
    """Give broken files to the command line."""
    whole = json.dumps(job(str(folder / "in.jsonl"), str(folder / "out-m"), model), indent=1)
    lines = "".join(json.dumps(row) + "\n" for row in rows(12).to_pylist()).encode()
    whole = whole.replace('"parquet"', '"jsonl"').replace('"scripted"', '"local"')
    pq.write_table(rows(12), folder / "whole.parquet")
    parquet = (folder / "whole.parquet").read_bytes()
    tracebacks, codes = 0, Counter[int]()
    for number in range(count):
        kind = number % 3
        form = "parquet" if kind == 2 else "jsonl"
        (folder / "in.jsonl").write_bytes(broken(lines, chance) if kind == 1 else lines)
        (folder / "in.parquet").write_bytes(broken(parquet, chance) if kind == 2 else parquet)
        text = whole.replace("jsonl", form) if form == "parquet" else whole
        (folder / "job.yaml").write_bytes(broken(text.encode(), chance) if kind == 0 else text.encode())
        for command in ("validate", "plan"):
            arguments = [command, str(folder / "job.yaml"), *(["--quiet"] if command == "plan" else [])]
            done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, cwd=folder)
            codes[done.returncode] += 1
            if "Traceback" in done.stdout + done.stderr or done.returncode not in EXIT_CODES:
                tracebacks += 1
                print(f"{command}, input {number}: {done.returncode}\n{done.stderr[-2000:]}", file=sys.stderr)
    return {"malformed_inputs": count, "tracebacks": tracebacks, "exit_codes": dict(sorted(codes.items()))}


def broken(content: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, cut off, or doubled."""
    start = chance.randrange(len(content))
    end = min(len(content), start + chance.randrange(1, 40))
    choice = chance.randrange(4)
    if choice == 0:
        return content[:start]
    if choice == 1:
        return content[:start] + content[end:]
    if choice == 2:
        return content[:end] + content[start:]
    return content[:start] + bytes(chance.randrange(256) for _ in range(end - start)) + content[end:]


@contextmanager
def prefect_server() -> Iterator[None]:
    """One temporary Prefect server for this process and those that it starts."""
    from prefect.settings import get_current_settings
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        os.environ["PREFECT_API_URL"] = str(get_current_settings().api.url)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--storage-faults", type=int, default=500)
    parser.add_argument("--malformed", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", type=Path, default=Path(".models"))
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    model = str(tiny_llama_folder(options.models.absolute()))
    chance = random.Random(options.seed)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, prefect_server():
        if options.malformed:
            found["malformed"] = malformed(options.malformed, chance, Path(folder), model)
        if options.kills:
            found["kills"] = kills(options.kills, chance, Path(folder), model)
        if options.storage_faults:
            found["storage"] = storage(options.storage_faults, options.seed, Path(folder), model)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for part, figures in found.items():
        print(f"{part}: {', '.join(f'{name} {value}' for name, value in figures.items())}")


if __name__ == "__main__":
    main()
