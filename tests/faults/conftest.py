"""One job that is run once, and put back as it was before every test."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from batchllm_operators.work.layout import MANIFEST_FILE
from tests.faults.told_jobs import REQUESTS, ToldJob, texts


@dataclass(frozen=True)
class Kept:
    """A job with complete output, a copy of all of it, and the right answers."""

    job: ToldJob
    copy: Path
    answers: pa.Table


@pytest.fixture(scope="session")
def kept(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("finished")
    job = ToldJob(folder / "job", tiny_llama)
    job.write_input(texts())
    outcome = job.run(sink__rows_per_file=10)
    assert outcome.computed == REQUESTS
    answers = job.output(outcome.manifest)
    assert answers["completion"].null_count == 0
    shutil.copytree(job.folder, folder / "copy")
    return Kept(job, folder / "copy", answers)


@pytest.fixture
def answers(kept: Kept) -> pa.Table:
    return kept.answers


@pytest.fixture
def complete(kept: Kept) -> ToldJob:
    """The job as it was when it was complete; its place and all times stay, and with them its id."""
    shutil.rmtree(kept.job.folder)
    shutil.copytree(kept.copy, kept.job.folder)
    return kept.job


@pytest.fixture
def unmerged(complete: ToldJob) -> ToldJob:
    """The job before its merge."""
    sink = complete.sink
    sink.delete([MANIFEST_FILE, *(name for name in sink.names() if name.startswith("part-"))])
    return complete
