"""The same tests on a local disk, on rclone and on moto."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from batchllm_operators.spec import StorageOptions
from batchllm_operators.store import Store

PLACES = ("disk", "rclone", "moto")


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """A second S3 server, of other habits than rclone; it accepts any key."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, StorageOptions]:
    """URI of an empty folder, and how to reach it."""
    if request.param == "disk":
        return str(tmp_path / "folder"), StorageOptions()
    if request.param == "rclone":
        return f"{request.getfixturevalue('bucket')}/folder", StorageOptions()
    request.getfixturevalue("s3_server")  # any key will do, but there must be one
    endpoint = request.getfixturevalue("moto_endpoint")
    name = f"bucket-{uuid4().hex[:12]}"
    s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/folder", StorageOptions(endpoint_url=endpoint)


@pytest.fixture
def store(place: tuple[str, StorageOptions]) -> Store:
    return Store(*place)


@pytest.fixture
def written(store: Store) -> Callable[..., Store]:
    """Writes objects of these names and gives the store."""

    def write(*names: str) -> Store:
        for name in names:
            store.write_bytes(name, name.encode())
        return store

    return write


@pytest.fixture
def unused_endpoint() -> Iterator[str]:
    """A port that is taken but where nobody listens."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"
