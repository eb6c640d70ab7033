from batchllm_operators.store import Store


def test_an_object_written_to_s3_is_read_back_and_listed(bucket: str) -> None:
    store = Store(f"{bucket}/folder")
    store.write_bytes("a/one.bin", b"content")
    assert store.read_bytes("a/one.bin") == b"content"
    assert store.names() == ["a/one.bin"]
    assert store.exists("a/one.bin")
    assert not store.exists("a/two.bin")
