"""What faults cost: runs that are killed, a store that fails, inputs that are broken.

    python -m benchmarks.faults [--kills 20] [--real-kills 2] [--storage-faults 500] [--malformed 60] [--json]

- Kills (`fault_kills`): a job of 240 requests on a scripted engine is killed (SIGKILL) at a moment drawn from the time
  of an undisturbed run, again and again; whenever a run completes, its output is held against that of the undisturbed
  one, and the next job begins. The real engine with the tiny model, started by `batchllm run`, has a turn of its own.
  One Prefect server serves all.
- Storage: the job runs on rclone's S3 server and on moto's, behind `fault_proxy`, where a tenth of the requests fail,
  until so many faults have been met; half of them on each.
- Malformed: job files and input objects with bytes changed, cut or doubled by the seed go through `batchllm validate`
  and `batchllm plan`: each must end with a documented exit code and, where it fails, one line.
- Secrets: a token in the environment and the store's secret key are searched in all that was written meanwhile:
  objects, logs and the database of Prefect's server.

`recomputed_share_max` is the largest share of a job's requests that one kill let be answered again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing.util
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from batchllm_flows import BatchJob, batch_inference
from batchllm_flows.demo.model import tiny_llama_folder
from batchllm_flows.demo.s3_server import serve_s3
from batchllm_operators.errors import BatchLLMError
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.store import Store
from batchllm_operators.temporary_folders import abandoned_folders
from benchmarks.fault_jobs import COMMAND, differences, job, output, prefect_database, rows
from benchmarks.fault_kills import FIGURES, Kills, real_kills, scripted_kills
from benchmarks.fault_proxy import FaultProxy
from benchmarks.faults_run import register_scripted

EXIT_CODES = (0, 1, 2, 3)
CANARY = "canary-9d41c07be2"


def storage(count: int, seed: int, endpoint: str, model: str) -> Counter[str]:
    """Run the job on a failing store until so many faults have been met."""
    import s3fs

    plain = {"endpoint_url": endpoint}
    s3fs.S3FileSystem(skip_instance_cache=True, **plain).mkdir("bucket")
    Store("s3://bucket/in", StorageOptions(**plain)).write_table("rows.parquet", rows())
    batch_inference(BatchJob.model_validate(job("s3://bucket/in/", "s3://bucket/undisturbed", model, plain)))
    expected = output(Store("s3://bucket/undisturbed", StorageOptions(**plain)))
    totals: Counter[str] = Counter()
    while totals["storage_faults"] < count:
        totals["storage_jobs"] += 1
        number = totals["storage_jobs"]
        with FaultProxy(endpoint, rate=0.1, seed=seed + number, lag_seconds=2.0) as proxy:
            values = job("s3://bucket/in/", f"s3://bucket/out-{number}", model, {"endpoint_url": proxy.url})
            values["execution"]["part_rows"] = 2
            try:
                batch_inference(BatchJob.model_validate(values))
            except BatchLLMError as error:
                print(f"job {number}: {error}", file=sys.stderr)
                totals["jobs_failed_by_faults"] += 1
            totals["storage_faults"] += proxy.faults.total()
        totals += differences(expected, output(Store(f"s3://bucket/out-{number}", StorageOptions(**plain))))
    return totals


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


def secrets(secrets_known: list[str], folder: Path) -> int:
    """How often secrets stand in what was written: everything in a folder, and the database of Prefect's server."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    contents = [*(file.read_bytes() for file in files), *prefect_database()]
    if not any(b"faults" in content for content in contents):
        raise ValueError("the search did not find the name of the job either")
    return sum(content.count(secret.encode()) for secret in secrets_known for content in contents)


@contextmanager
def prefect_server() -> Iterator[None]:
    """One temporary Prefect server for this process and those that it starts."""
    from prefect.settings import get_current_settings
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        os.environ["PREFECT_API_URL"] = str(get_current_settings().api.url)
        yield


@contextmanager
def s3_servers(folder: Path) -> Iterator[list[str]]:
    """The endpoints of rclone's server and of moto's, whose credentials are in the environment."""
    from moto.server import ThreadedMotoServer

    with serve_s3(folder / "buckets") as server, ExitStack() as stack:
        os.environ.update(server.environment())
        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        stack.callback(moto.stop)
        host, port = moto.get_host_and_port()
        yield [os.environ["AWS_ENDPOINT_URL"], f"http://{host}:{port}"]


def measured(options: argparse.Namespace, folder: Path, model: str) -> dict[str, Any]:
    """All figures."""
    chance, totals, shares = random.Random(options.seed), Counter[str](), []
    found: dict[str, Any] = {}
    if options.malformed:
        found |= malformed(options.malformed, chance, folder, model)
    turns: list[tuple[int, Kills]] = [(options.kills, scripted_kills(folder / "scripted", model))]
    turns += [(options.real_kills, real_kills(folder / "real", model))]
    for count, turn in turns:
        if count:
            figures = turn.measure(count, chance)
            print(f"{turn.folder.name}: {figures}", file=sys.stderr)
            shares += [figures.pop("recomputed_share_max")] if "recomputed_share_max" in figures else []
            totals.update(figures)
    if options.storage_faults:
        register_scripted(folder / "answered-storage")
        with s3_servers(folder) as endpoints:
            for endpoint in endpoints:
                figures = storage(options.storage_faults // 2, options.seed, endpoint, model)
                print(f"{endpoint}: {dict(figures)}", file=sys.stderr)
                totals.update(figures)
    totals["leftover_files"] += len(abandoned_folders())
    found = {name: totals[name] for name in ("kills", *FIGURES, "storage_faults", "jobs_failed_by_faults")} | found
    known = [CANARY, *([os.environ["AWS_SECRET_ACCESS_KEY"]] if "AWS_SECRET_ACCESS_KEY" in os.environ else [])]
    return found | {"recomputed_share_max": max(shares, default=None), "secrets_found": secrets(known, folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="on the scripted engine")
    parser.add_argument("--real-kills", type=int, default=2, help="on the real one")
    parser.add_argument("--storage-faults", type=int, default=500)
    parser.add_argument("--malformed", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", type=Path, default=Path(".models"))
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    model = str(tiny_llama_folder(options.models.absolute()))
    os.environ["HF_TOKEN"] = CANARY
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, prefect_server():
        multiprocessing.util.get_temp_dir()  # made once, and removed at the very end
        # So that only what these runs leave is counted.
        os.environ["TMPDIR"] = tempfile.tempdir = str(Path(folder) / "tmp")
        for name in ("tmp", "data"):
            Path(folder, name).mkdir()
        found = measured(options, Path(folder) / "data", model)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
