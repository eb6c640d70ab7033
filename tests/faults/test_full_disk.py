"""A disk without room: one error that says so, and what was there stays."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.merge.sink import check_sink
from batchllm_operators.store import Store
from tests.merge.conftest import Job, answer


def fill(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if (
        mount is None
        or umount is None
        or subprocess.run([mount, *options], check=False, capture_output=True).returncode
    ):
        pytest.skip("mounting a file system needs rights")
    yield folder
    subprocess.run([umount, str(folder)], check=True)


@pytest.fixture
def overwriting(tmp_path: Path) -> Job:
    """A job with answers, over the output of another job."""
    job = Job(tmp_path / "job", list(range(6)))
    job.add_results(*(answer(number) for number in range(6)))
    job.merge(job_id="other-job")
    return job


def test_an_overwrite_on_a_full_disk_leaves_the_old_output_complete(
    overwriting: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = overwriting.sink.objects()
    write = Store.writer

    def write_until_full(self: Store, name: str) -> object:
        if name.startswith("part-00001"):
            monkeypatch.setattr(os, "fsync", fill)
        return write(self, name)

    monkeypatch.setattr(Store, "writer", write_until_full)
    with pytest.raises(TerminalError, match="no space left on the local disk"):
        overwriting.merge(mode="overwrite", rows_per_file=2)
    assert overwriting.sink.objects() == before
    assert check_sink(overwriting.sink, "error", "other-job") is not None


def test_an_overwrite_on_a_disk_that_is_really_full_leaves_the_old_output_complete(
    small_disk: Path, tmp_path: Path
) -> None:
    job = Job(tmp_path / "job", list(range(4000)))
    job.add_results(*(answer(number, os.urandom(32).hex()) for number in range(4000)))
    job.sink = Store(str(small_disk / "sink"))
    job.merge(job_id="other-job")
    before = job.sink.objects()
    for form in ("parquet", "jsonl"):
        with pytest.raises(TerminalError, match="no space left on the local disk"):
            job.merge(mode="overwrite", format=form, rows_per_file=1000)
        assert job.sink.objects() == before


def test_a_full_temporary_folder_is_said_with_its_place(overwriting: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    before = overwriting.sink.objects()
    monkeypatch.setattr(pa, "OSFile", fill)
    with pytest.raises(TerminalError, match=r"merge: no space left for temporary files in .*TMPDIR"):
        overwriting.merge(mode="overwrite")
    assert overwriting.sink.objects() == before


def test_a_full_temporary_folder_of_uploads_is_said(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(TerminalError, match=rf"no space left on the local disk.*{tempfile.gettempdir()}"):
        Store(bucket).write_bytes("one", b"content")
    assert Store(bucket).names() == []
