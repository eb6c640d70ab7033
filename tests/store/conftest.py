"""The same tests on a local disk, on rclone and on moto."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.store import Store


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
