"""Which objects a source URI names."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats.input_objects import find_input
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.store import Store

Written = Callable[..., Store]
SUFFIXES = (".parquet",)


def found(uri: str, options: StorageOptions) -> list[str]:
    place = find_input(uri, options, SUFFIXES)
    assert all(place.store.exists(one.path) for one in place.objects)
    return [place.store.uri_of(one.path) for one in place.objects]


def test_a_folder_is_taken_with_all_below_it_but_nothing_hidden(
    written: Written, place: tuple[str, StorageOptions]
) -> None:
    store = written(
        "b.parquet", "a.parquet", "deep/c.parquet", "readme.txt", "_manifest.json", "_batchllm/x/staged/part.parquet",
        ".hidden/d.parquet",
    )  # fmt: skip
    names = [store.uri_of(name) for name in ("a.parquet", "b.parquet", "deep/c.parquet")]
    assert found(place[0], place[1]) == names
    assert found(f"{place[0]}/", place[1]) == names


def test_a_glob_takes_what_matches_but_nothing_hidden(written: Written, place: tuple[str, StorageOptions]) -> None:
    store = written("a.parquet", "b.txt", "_c.parquet", "deep/d.parquet", "_batchllm/e.parquet")
    assert found(f"{place[0]}/*.parquet", place[1]) == [store.uri_of("a.parquet")]
    assert found(f"{place[0]}/**", place[1]) == [
        store.uri_of(name) for name in ("a.parquet", "b.txt", "deep/d.parquet")
    ]
    assert found(f"{place[0]}/_batchllm/*", place[1]) == [store.uri_of("_batchllm/e.parquet")]


def test_a_single_object_is_taken_whatever_its_name(written: Written, place: tuple[str, StorageOptions]) -> None:
    store = written("a.parquet", "odd[1].data", "_hidden")
    for name in ("a.parquet", "odd[1].data", "_hidden"):
        assert found(store.uri_of(name), place[1]) == [store.uri_of(name)]


def test_nothing_found_says_what_was_looked_for(written: Written, place: tuple[str, StorageOptions]) -> None:
    written("readme.txt")
    with pytest.raises(TerminalError, match=r"no object matches \(expected names that end in \.parquet\)") as caught:
        find_input(place[0], place[1], SUFFIXES)
    assert caught.value.uri == place[0]
    with pytest.raises(TerminalError, match="no object matches"):
        find_input(f"{place[0]}/*.parquet", place[1], SUFFIXES)


def test_a_whole_bucket_can_be_the_source(bucket: str) -> None:
    Store(bucket).write_bytes("deep/a.parquet", b"")
    assert found(bucket, StorageOptions()) == [f"{bucket}/deep/a.parquet"]
    assert found(f"{bucket}/", StorageOptions()) == [f"{bucket}/deep/a.parquet"]
    assert found(f"{bucket}/*/*", StorageOptions()) == [f"{bucket}/deep/a.parquet"]


def test_a_missing_bucket_is_no_empty_folder(s3_server: object) -> None:
    for uri in ("s3://no-such-bucket-here", "s3://no-such-bucket-here/a", "s3://no-such-bucket-here/a/*.parquet"):
        with pytest.raises(TerminalError, match="bucket does not exist"):
            find_input(uri, StorageOptions(), SUFFIXES)
