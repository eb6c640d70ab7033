"""A format that is added in under 60 lines from outside the package, and used from input to output."""

from __future__ import annotations

from pathlib import Path

import orjson
import pyarrow as pa
import pytest

from batchllm_flows.verify import verify_output
from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import open_source
from batchllm_operators.merge.merging import merge_results
from batchllm_operators.records import Manifest, StageSummary
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.sampling import SamplingSpec
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.specs.source import SourceSpec, TemplatePrompt
from batchllm_operators.stage.step import stage_source
from batchllm_operators.store import Store
from tests.formats import tabbed as toy
from tests.inputs.carried import answer

pytestmark = pytest.mark.usefixtures("tabbed")

PROMPT = TemplatePrompt(kind="template", template="{{ text }}")
FIRST = b"id\ttext\n1\tone\n2\ttwo\n"
SECOND = b"text\tid\tnote\nthree\t3\tlate\nfour\nfive\t5\t\n"


class TabbedJob:
    """A job from TABBED to TABBED on a store, by the real steps; only the engine is left out."""

    def __init__(self, uri: str, storage: StorageOptions, model: str) -> None:
        self.store = Store(uri, storage)
        self.source = SourceSpec(uri=f"{uri}/in", format="tabbed", id_column="id", storage=storage)
        self.sink = SinkSpec(uri=f"{uri}/out", format="tabbed", storage=storage)
        self.work_uri = f"{uri}/work"
        self.model = ModelSpec(id=model)

    def stage(self) -> StageSummary:
        return stage_source(
            self.source, PROMPT, SamplingSpec(), self.model, self.work_uri, self.source.storage
        )  # fmt: skip

    def merge(self, staged: StageSummary) -> Manifest:
        work = Store(self.work_uri, self.source.storage)
        answer(staged, work)
        opened = open_source(self.source)
        return merge_results(
            opened, staged, work, Store(self.sink.uri, self.sink.storage), self.sink, job_id="0123", job_name="tabbed",
            fingerprint=opened.objects, max_error_fraction=1.0,
        )  # fmt: skip


@pytest.fixture
def job(tmp_path: Path, tiny_llama: str) -> TabbedJob:
    return with_input(TabbedJob(str(tmp_path), StorageOptions(), tiny_llama))


def with_input(job: TabbedJob) -> TabbedJob:
    job.store.write_bytes("in/a.tabbed", FIRST)
    job.store.write_bytes("in/deep/B.TBD", SECOND)
    job.store.write_bytes("in/notes.txt", b"no data")
    return job


def test_the_format_is_less_than_60_lines_of_public_names() -> None:
    assert toy.__file__ is not None
    lines = Path(toy.__file__).read_text().splitlines()
    assert len(lines) < 60
    imported = {line.split()[1] for line in lines if line.startswith("from batchllm")}
    assert imported == {"batchllm_operators.formats", "batchllm_operators.store"}


def test_a_job_is_staged_from_it_and_merged_to_it(place: tuple[str, StorageOptions], tiny_llama: str) -> None:
    job = with_input(TabbedJob(*place, tiny_llama))
    staged = job.stage()
    assert (staged.rows, staged.requests, staged.error_rows) == (5, 4, {"invalid_row": 1})
    fault = staged.error_examples["invalid_row"][0]
    assert fault.message == "object deep/B.TBD line 3: 1 fields, not 3"
    assert staged.left_out_examples == ("notes.txt (unknown ending)",)

    manifest = job.merge(staged)
    (file,) = manifest.files
    assert (file.rows, manifest.rows, manifest.layout.format) == (5, 5, "tabbed")
    assert file.name.endswith(".tabbed")
    lines = Store(job.sink.uri, job.sink.storage).read_bytes(file.name).decode().split("\n")
    answered = "yes\tstop\t\t1\t0\t1"
    error = f'{{"code": "invalid_row", "message": "{fault.message}"}}'
    assert lines == [
        "id\ttext\tnote\tcompletion\tfinish_reason\terror\tprompt_tokens\tcached_tokens\tcompletion_tokens",
        f"1\tone\t\t{answered}", f"2\ttwo\t\t{answered}", f"3\tthree\tlate\t{answered}",
        f"\t\t\t\t\t{error}\t\t\t", f"5\tfive\t\t{answered}", "",
    ]  # fmt: skip


def test_an_output_in_it_is_verified_and_a_damaged_one_is_found(job: TabbedJob) -> None:
    manifest = job.merge(job.stage())
    found = verify_output(job.sink)
    # The work folder of this job has no job.json: only the flow writes one.
    assert [fault.uri for fault in found.faults if fault.uri.endswith(".tabbed")] == []
    sink = Store(job.sink.uri, job.sink.storage)
    content = sink.read_bytes(manifest.files[0].name)
    sink.write_bytes(manifest.files[0].name, content.replace(b"one", b"two"))
    assert any("expected digest" in fault.what for fault in verify_output(job.sink).faults)


def test_its_output_is_never_taken_for_input_of_the_next_run(job: TabbedJob) -> None:
    glob = job.source.model_copy(update={"uri": f"{job.store.uri}/in/**/*.tabbed"})
    job.source, job.sink = glob, job.sink.model_copy(update={"uri": f"{job.store.uri}/in/answers"})
    with pytest.raises(TerminalError, match=r"sink\.uri: what is written there would be input of the next run"):
        job.merge(job.stage())


def test_an_output_of_several_files_and_one_without_rows(job: TabbedJob) -> None:
    job.sink = job.sink.model_copy(update={"rows_per_file": 2})
    assert [file.rows for file in job.merge(job.stage()).files] == [2, 2, 1]
    empty = TabbedJob(f"{job.store.uri}/empty", job.source.storage, job.model.id)
    empty.store.write_bytes("in/a.tabbed", b"id\ttext\n")
    assert [file.rows for file in empty.merge(empty.stage()).files] == [0]


def test_rows_of_it_go_into_a_sink_of_any_other_format(job: TabbedJob) -> None:
    staged = job.stage()
    for form in ("parquet", "jsonl"):
        job.sink = SinkSpec(uri=f"{job.store.uri}/{form}", format=form, storage=job.sink.storage)
        file = job.merge(staged).files[0]
        content = Store(job.sink.uri, job.sink.storage).read_bytes(file.name)
        rows = (
            pa.parquet.read_table(pa.BufferReader(content)).to_pylist()
            if form == "parquet"
            else [orjson.loads(line) for line in content.splitlines()]
        )
        assert [row["text"] for row in rows] == ["one", "two", "three", None, "five"]
        assert [row["completion"] for row in rows] == ["yes", "yes", "yes", None, "yes"]


def test_more_rows_than_a_batch_keep_their_order_and_their_faults(job: TabbedJob) -> None:
    rows = [b"only one" if number % 1000 == 999 else b"%d\tt" % number for number in range(2500)]
    job.store.write_bytes("in/a.tabbed", b"id\ttext\n" + b"\n".join(rows) + b"\n")
    source = open_source(job.source)
    batches = list(source.batches(["id", "text"]))
    assert source.rows is None
    assert [record["id"] for batch in batches for record in batch.records()][:2500] == [
        None if number % 1000 == 999 else str(number) for number in range(2500)
    ]
    faulty = [batch.first_row + offset for batch in batches for offset in batch.faults]
    assert faulty == [999, 1999, 2501]


def test_types_that_the_job_names_are_those_of_the_columns(job: TabbedJob) -> None:
    job.store.write_bytes("in/deep/B.TBD", b"id\n3\n")
    typed = SourceSpec(uri=job.source.uri, format="tabbed", schema={"id": "int64"}, storage=job.source.storage)
    assert open_source(typed).schema.field("id").type == pa.int64()
    job.store.write_bytes("in/deep/B.TBD", b"id\nthree\n")
    with pytest.raises(TerminalError, match="a value there is no int64"):
        _ = open_source(typed).schema
