"""What killed writers leave of objects that they did not finish: found, and removed by who may."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchllm_flows.work_lease import WorkLease
from batchllm_operators.errors import TerminalError
from batchllm_operators.merge.claim import SinkClaim
from batchllm_operators.store import Store
from batchllm_operators.unfinished_removal import discard_unfinished

WRITER = """
import sys, time
from batchllm_operators.store import Store
with Store(sys.argv[1]).writer(sys.argv[2]) as file:
    file.write(b"half")
    file.flush()
    print("begun", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def begin(store: Store) -> Callable[[str], None]:
    """Begins an object and does not finish it: a process that is killed on a disk, an upload of two parts on S3."""

    def on_disk(name: str) -> None:
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, store.uri, name], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begun\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait()

    def on_s3(name: str) -> None:
        fs: Any = store._fs
        bucket, _, prefix = store._root.partition("/")
        place = {"Bucket": bucket, "Key": f"{prefix}/{name}"}
        upload = fs.call_s3("create_multipart_upload", **place)["UploadId"]
        fs.call_s3("upload_part", **place, UploadId=upload, PartNumber=1, Body=b"x" * (5 << 20))

    return on_disk if "://" not in store.uri else on_s3


def test_they_are_no_objects_and_are_found_by_name(store: Store, begin: Callable[[str], None]) -> None:
    store.write_bytes("part-0.jsonl", b"whole")
    assert store.unfinished_writes() == []
    began = time.time()
    begin("part-1.jsonl")
    begin("deeper/part-2.jsonl")
    assert store.names() == ["part-0.jsonl"]
    found = {write.name: write for write in store.unfinished_writes()}
    assert sorted(found) == ["deeper/part-2.jsonl", "part-1.jsonl"]
    if "127.0.0.1" not in str(store.options.endpoint_url):  # moto gives the same day of 2010 for all of them
        assert all(abs(write.began - began) < 120 for write in found.values())
    assert discard_unfinished(store, lambda write: write.name.startswith("deeper/")) == 1
    assert [write.name for write in store.unfinished_writes()] == ["part-1.jsonl"]
    # Of another folder whose name begins alike nothing is touched.
    assert Store(f"{store.uri}/deep", store.options).unfinished_writes() == []
    assert discard_unfinished(store) == 1
    assert store.unfinished_writes() == []
    assert store.names() == ["part-0.jsonl"]


def test_a_write_that_others_have_removed_is_no_error(store: Store, begin: Callable[[str], None]) -> None:
    begin("part-1.jsonl")
    found = store.unfinished_writes()
    store.discard_writes(found)
    store.discard_writes(found)
    assert store.unfinished_writes() == []


def test_the_next_run_removes_those_of_the_work_folder(store: Store, begin: Callable[[str], None]) -> None:
    work = store.folder("work")
    begin("work/results/part-1.parquet")
    begin("elsewhere.parquet")
    with WorkLease(work, "wait", log=lambda *_values: None):
        pass
    assert [write.name for write in store.unfinished_writes()] == ["elsewhere.parquet"]


def test_a_run_that_joins_another_touches_nothing(store: Store, begin: Callable[[str], None]) -> None:
    with WorkLease(store, "wait", log=lambda *_values: None):
        begin("results/part-1.parquet")
        with WorkLease(store, "join", log=lambda *_values: None):
            assert len(store.unfinished_writes()) == 1


@pytest.mark.parametrize("slice_id", [None, "night"])
def test_who_claims_an_output_removes_its_own_and_leaves_what_another_may_be_writing(
    store: Store, begin: Callable[[str], None], slice_id: str | None
) -> None:
    owner = slice_id or "job"
    begin(f"dt=1/part-00000-{owner}-0123abcd.parquet")
    begin("dt=1/part-00000-another-0123abcd.parquet")
    begin("_batchllm/another/staged/part-00000.parquet")
    with SinkClaim(store, "job", "append" if slice_id else "overwrite", slice_id) as claim:
        left = {write.name for write in store.unfinished_writes()}
        claim.release()
    kept = {"_batchllm/another/staged/part-00000.parquet"}
    if "127.0.0.1" not in str(store.options.endpoint_url):  # moto gives the same day of 2010 for all of them
        kept |= {"dt=1/part-00000-another-0123abcd.parquet"}
    assert left == kept


def test_a_store_that_refuses_to_list_them_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_store: Store) -> list[Any]:
        raise TerminalError("access denied: ListMultipartUploads")

    monkeypatch.setattr(Store, "unfinished_writes", refused)
    assert discard_unfinished(Store(str(tmp_path))) == 0
    assert "killed runs have left are not looked for: access denied" in caplog.text
