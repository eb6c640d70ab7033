"""What every store must do, on a local disk and on two S3 servers."""

from __future__ import annotations

import errno
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from batchllm_operators.errors import DamagedObjectError, TerminalError, TransientError
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.store import Store

Written = Callable[..., Store]


def test_what_is_written_is_read_back(store: Store) -> None:
    store.write_bytes("a/one.bin", b"content")
    assert store.read_bytes("a/one.bin") == b"content"
    with store.reader("a/one.bin") as file:
        assert file.read(3) == b"con"


def test_writing_again_replaces(store: Store) -> None:
    store.write_bytes("one", b"first")
    store.write_bytes("one", b"second")
    assert store.read_bytes("one") == b"second"


def test_an_object_of_several_megabytes_is_stored_whole(store: Store) -> None:
    content = bytes(range(256)) * 80_000
    store.write_bytes("large", content)
    assert store.read_bytes("large") == content


def test_names_lists_a_folder_and_all_below_it_sorted(written: Written) -> None:
    store = written("b", "a/two", "a/one", "a/deep/er/three")
    assert store.names() == ["a/deep/er/three", "a/one", "a/two", "b"]
    assert store.names("a") == ["a/deep/er/three", "a/one", "a/two"]
    assert store.folder("a").names() == ["deep/er/three", "one", "two"]


def test_a_folder_that_does_not_exist_has_no_names(store: Store) -> None:
    assert store.names() == []
    assert store.names("nowhere") == []
    assert store.objects() == []


def test_a_name_that_begins_like_another_folder_is_not_in_it(written: Written) -> None:
    store = written("part/one", "partial/two")
    assert store.names("part") == ["part/one"]


def test_exists_tells_objects_from_folders(written: Written) -> None:
    store = written("a/one")
    assert store.exists("a/one")
    assert not store.exists("a")
    assert not store.exists("a/two")


def test_objects_are_matched_by_glob(written: Written) -> None:
    store = written("one.parquet", "two.parquet", "three.txt", "deep/four.parquet")
    assert [one.path for one in store.objects("*.parquet")] == ["one.parquet", "two.parquet"]
    assert [one.path for one in store.objects("**/*.parquet")] == ["deep/four.parquet", "one.parquet", "two.parquet"]
    assert [one.path for one in store.objects("*/f?ur.*")] == ["deep/four.parquet"]


def test_an_object_has_its_size_and_a_version_that_changes_with_its_content(store: Store) -> None:
    store.write_bytes("one", b"12345")
    (before,) = store.objects()
    assert (before.path, before.size) == ("one", 5)
    assert store.object("one") == before
    store.write_bytes("one", b"54321")
    (after,) = store.objects()
    assert after.version != before.version


def test_the_newest_objects_come_first(store: Store) -> None:
    for name in ("b/one", "c/one", "a/one"):
        if name != "b/one":
            time.sleep(1.1)  # S3 tells times in seconds
        store.write_bytes(name, b"content")
    store.write_bytes("a/two", b"content")
    assert store.newest("*/one") == ["a/one", "c/one", "b/one"]
    assert store.newest("*/three") == []
    time.sleep(1.1)
    store.write_bytes("b/one", b"again")
    assert store.newest("*/one")[0] == "b/one"


def test_deleting_what_is_not_there_is_no_error(written: Written) -> None:
    store = written("one", "two")
    store.delete(["one", "nothing"])
    assert store.names() == ["two"]


def test_a_writer_left_by_an_exception_leaves_no_object(store: Store) -> None:
    def write_and_fail() -> None:
        with store.writer("one") as file:
            file.write(b"half of it")
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        write_and_fail()
    assert store.names() == []
    assert not store.exists("one")


def test_a_writer_left_by_an_exception_leaves_the_old_object(store: Store) -> None:
    store.write_bytes("one", b"old")

    def write_and_fail() -> None:
        with store.writer("one") as file:
            file.write(b"half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert store.read_bytes("one") == b"old"


def test_an_object_is_not_visible_while_it_is_written(store: Store) -> None:
    with store.writer("one") as file:
        file.write(b"half of it")
        file.flush()
        assert store.names() == []
        assert store.objects() == []
    assert store.names() == ["one"]


def test_a_table_is_read_back_as_parquet(store: Store) -> None:
    table = pa.table({"number": list(range(5000)), "text": ["x"] * 5000})
    store.write_table("table.parquet", table)
    with store.parquet("table.parquet") as file:
        assert file.read() == table
    assert store.parquet_schema("table.parquet") == (table.schema, 5000)
    batches = list(store.scan_parquet("table.parquet", ["number"], 1000))
    assert max(len(batch) for batch in batches) <= 1000
    assert pa.Table.from_batches(batches) == table.select(["number"])


def test_a_write_with_a_condition_replaces_only_what_is_expected(store: Store) -> None:
    assert store.write_if("one", b"first", None)
    assert not store.write_if("one", b"second", None)
    first = store.object("one")
    assert store.write_if("one", b"other content", first)
    assert not store.write_if("one", b"and yet another", first)
    assert not store.write_if("two", b"where nothing is", first)
    assert store.read_bytes("one") == b"other content"
    assert store.names() == ["one"]


def test_of_many_writers_at_once_one_makes_the_object(store: Store) -> None:
    with ThreadPoolExecutor(8) as writers:
        made = list(writers.map(lambda number: store.write_if("one", b"%d" % number, None), range(8)))
    winner = int(store.read_bytes("one"))
    assert made[winner]
    if not store.uri.startswith("s3://") or store.options.endpoint_url is not None:
        assert sum(made) == 1, "the disk and moto honour conditions; rclone does not"


def test_what_is_not_there_has_no_content(written: Written) -> None:
    store = written("a/one")
    assert store.content("a/one") == b"a/one"
    assert [store.content(name) for name in ("a", "a/two", "a/one/more")] == [None, None, None]


def test_an_object_is_moved(written: Written) -> None:
    store = written("a/one", "two")
    store.move("a/one", "deep/er/one")
    store.move("nothing", "deep/nothing")
    assert store.names() == ["deep/er/one", "two"]
    assert store.read_bytes("deep/er/one") == b"a/one"


PATTERNS = [("run[1]", "run1"), ("out*", "out-1"), ("ru?", "run"), ("[!a]", "b"), ("**", "deep/er")]


@pytest.mark.parametrize(("folder", "other"), PATTERNS)
def test_a_folder_whose_name_is_a_pattern_is_removed_and_not_what_matches_it(
    written: Written, folder: str, other: str
) -> None:
    store = written(f"{folder}/results/one", f"{folder}/two", f"{other}/results/one", f"{other}/two")
    store.folder(folder).remove()
    assert store.names() == [f"{other}/results/one", f"{other}/two"]


@pytest.mark.parametrize(("folder", "other"), PATTERNS)
def test_an_object_whose_name_is_a_pattern_is_moved_and_not_what_matches_it(
    written: Written, folder: str, other: str
) -> None:
    store = written(f"{folder}/w/one[2]*", f"{other}/w/one2", f"{other}/w/one[2]-")
    inside = store.folder(f"{folder}/w")
    inside.move("one[2]*", "quarantine/one[2]-*")
    assert inside.names() == ["quarantine/one[2]-*"]
    assert inside.read_bytes("quarantine/one[2]-*") == f"{folder}/w/one[2]*".encode()
    assert store.names(other) == sorted([f"{other}/w/one2", f"{other}/w/one[2]-"])


@pytest.mark.parametrize(("folder", "other"), PATTERNS)
def test_objects_below_a_folder_whose_name_is_a_pattern_are_read_listed_and_deleted_exactly(
    written: Written, folder: str, other: str
) -> None:
    store = written(f"{folder}/w/one", f"{other}/w/one", f"{other}/w/two")
    inside = store.folder(f"{folder}/w")
    assert inside.names() == ["one"]
    assert [one.path for one in inside.objects("*")] == ["one"]
    assert inside.content("one") == f"{folder}/w/one".encode()
    assert (inside.exists("two"), inside.content("two")) == (False, None)
    assert inside.write_if("two", b"here", None)
    inside.write_table("table", pa.table({"number": [1, 2]}))
    assert sum(batch.num_rows for batch in inside.scan_parquet("table", ["number"], 10)) == 2
    inside.delete(["one", "two", "table"])
    assert store.names() == [f"{other}/w/one", f"{other}/w/two"]


def test_the_digest_of_what_was_written_is_that_of_what_is_read(store: Store) -> None:
    digest = store.write_table("one.parquet", pa.table({"number": list(range(5000))}))
    assert store.digest("one.parquet") == digest
    with store.writer("two") as file:
        file.write(b"content")
        told = file.digest()
    assert store.digest("two") == told != digest


def test_a_folder_knows_where_it_stands_in_another(store: Store, bucket: str) -> None:
    inner = store.folder("a/b")
    assert inner.path_from(store) == "a/b"
    assert store.path_from(store) == ""
    assert store.path_from(inner) is None
    assert store.folder("ab").path_from(store.folder("a")) is None
    assert Store(bucket).path_from(Store("/")) is None


def test_a_folder_on_disk_is_found_through_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert Store(str(tmp_path / "link" / "a")).path_from(Store(str(tmp_path / "real"))) == "a"


def test_a_flipped_bit_of_a_page_is_named_and_never_read(store: Store) -> None:
    table = pa.table({"text": [f"answer {number}" for number in range(1000)], "n": list(range(1000))})
    store.write_table("one.parquet", table)
    with store.parquet("one.parquet") as file:
        pages = file.metadata.row_group(0).column(0)
    content = bytearray(store.read_bytes("one.parquet"))
    content[pages.data_page_offset + pages.total_compressed_size // 3] ^= 1
    store.write_bytes("one.parquet", bytes(content))
    with pytest.raises(DamagedObjectError, match="not a readable Parquet object"), store.parquet("one.parquet") as file:
        file.read()
    with pytest.raises(DamagedObjectError, match="not a readable Parquet object"):
        list(store.scan_parquet("one.parquet", ["text"], 100))


@pytest.mark.parametrize("form", ["writer", "write_if"])
def test_a_full_disk_is_said_and_leaves_the_old_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    store = Store(str(tmp_path / "folder"))
    store.write_bytes("one", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TerminalError, match="no space left on the local disk"):
        if form == "writer":
            store.write_bytes("one", b"new")
        else:
            store.write_if("one", b"new", store.object("one"))
    assert store.read_bytes("one") == b"old"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["one"]


def test_an_object_that_is_not_parquet_is_named(store: Store) -> None:
    store.write_bytes("one.parquet", b"this is not Parquet")
    with pytest.raises(TerminalError, match="not a readable Parquet object") as caught, store.parquet("one.parquet"):
        pass
    assert caught.value.uri == store.uri_of("one.parquet")


def test_a_parquet_object_damaged_inside_is_named(store: Store) -> None:
    store.write_table("one.parquet", pa.table({"number": list(range(100_000))}))
    content = bytearray(store.read_bytes("one.parquet"))
    content[100:-2000] = b"\xff" * (len(content) - 2100)
    store.write_bytes("one.parquet", bytes(content))
    with pytest.raises(TerminalError, match="not a readable Parquet object") as caught:
        list(store.scan_parquet("one.parquet", ["number"], 1000))
    assert caught.value.uri == store.uri_of("one.parquet")


def test_a_missing_object_is_named(written: Written) -> None:
    store = written("one")
    with pytest.raises(TerminalError, match="no such object") as caught:
        store.read_bytes("two")
    assert caught.value.uri == store.uri_of("two")
    with pytest.raises(TerminalError, match="no such object"), store.reader("two"):
        pass


def test_a_store_travels_to_other_processes(written: Written) -> None:
    store = pickle.loads(pickle.dumps(written("one")))  # noqa: S301 - our own bytes
    assert store.names() == ["one"]


def test_a_missing_bucket_is_said_with_its_endpoint(place: tuple[str, StorageOptions]) -> None:
    uri, options = place
    if not uri.startswith("s3://"):
        pytest.skip("a disk has no buckets")
    store = Store("s3://no-such-bucket-here/folder", options)

    def write() -> None:
        store.write_bytes("one", b"content")

    attempts: list[Callable[[], object]] = [
        store.objects, store.names, write, lambda: store.exists("one"), lambda: store.read_bytes("one"),
        lambda: store.objects("*.parquet"),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(TerminalError, match=r"bucket does not exist: endpoint http://\S+, bucket 'no-such-bucket"):
            attempt()


def test_wrong_credentials_are_said_with_endpoint_and_bucket_and_no_secret(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    store = Store(f"{bucket}/folder")

    def write() -> None:
        store.write_bytes("one", b"content")

    attempts: list[Callable[[], object]] = [
        store.objects, store.names, write, lambda: store.exists("one"), lambda: store.read_bytes("one"),
        lambda: store.objects("*.parquet"),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(TerminalError, match=r"access denied by endpoint http://\S+, bucket 'bucket-") as caught:
            attempt()
        assert "secret" not in str(caught.value)


def test_no_credentials_at_all_are_said(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(TerminalError, match=r"no credentials found for endpoint http://\S+, bucket 'bucket-"):
        Store(bucket).objects()


def test_an_endpoint_where_nobody_answers_is_a_transient_error(
    bucket: str, monkeypatch: pytest.MonkeyPatch, unused_endpoint: str
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store = Store(bucket, StorageOptions(endpoint_url=unused_endpoint))
    with pytest.raises(TransientError, match=rf"no answer from endpoint {unused_endpoint}, bucket 'bucket-"):
        store.objects()


def test_an_unknown_profile_is_said(bucket: str) -> None:
    with pytest.raises(TerminalError, match="no-such-profile"):
        Store(bucket, StorageOptions(profile="no-such-profile")).objects()


def test_files_on_disk_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    Store(str(tmp_path)).write_bytes("one", b"content")
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_is_a_file_is_an_error_on_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TerminalError, match="local disk"):
        Store(str(tmp_path / "file")).write_bytes("one", b"content")
