"""What the tests share: real S3 servers, the models, an ephemeral Prefect."""

from __future__ import annotations

import atexit
import importlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from filelock import FileLock

from batchllm_flows.demo.model import smollm2_folder, tiny_llama_folder
from batchllm_flows.demo.s3_server import S3Server, serve_s3
from batchllm_operators.execute.backends import BackendKind, register_backend, unregister_backend
from batchllm_operators.execute.backends.inline import InlineBackend, Script, ScriptedMaker
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.execution import ExecutionSpec

PLACES = ("disk", "rclone", "moto")
REPOSITORY = Path(__file__).parent.parent
MODELS = Path(os.environ.get("BATCHLLM_MODELS", REPOSITORY / ".models"))

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Temporary servers of Prefect keep their database in its home, where two of them would wait for each other.
    os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix=f"batchllm-prefect-{worker}-")
    atexit.register(shutil.rmtree, os.environ["PREFECT_HOME"], ignore_errors=True)
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextmanager
def models() -> Iterator[Path]:
    """The folder of the models, for one process at a time: what makes a model does not expect another at it."""
    MODELS.mkdir(exist_ok=True)
    with FileLock(MODELS / ".lock"):
        yield MODELS


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of SmolLM2-135M-Instruct."""
    with models() as folder:
        return str(smollm2_folder(folder))


@pytest.fixture(scope="session")
def tiny_llama() -> str:
    """Folder of a random two-layer model with SmolLM2's tokenizer."""
    with models() as folder:
        return str(tiny_llama_folder(folder))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server that checks credentials; its environment is set for the session."""
    root = tmp_path_factory.mktemp("s3") / "buckets"
    with serve_s3(root) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    """URI of a new empty bucket."""
    import s3fs

    name = f"bucket-{uuid4().hex[:12]}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """A second S3 server, of other habits than rclone; it accepts any key."""
    from moto.server import ThreadedMotoServer

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
    import s3fs

    request.getfixturevalue("s3_server")  # any key will do, but there must be one
    endpoint = request.getfixturevalue("moto_endpoint")
    name = f"bucket-{uuid4().hex[:12]}"
    s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/folder", StorageOptions(endpoint_url=endpoint)


class InlineEngines:
    """What jobs with `execution.backend: inline` run on: scripted engines in threads of this process."""

    def __init__(self) -> None:
        self.script = Script()
        """Of the engines that are started from now on."""
        self.backends: list[InlineBackend] = []
        """All that were opened, in their order."""

    def open(self, execution: ExecutionSpec) -> InlineBackend:
        """The engines of a run; `BackendKind.open`."""
        self.backends.append(InlineBackend(execution.engines, lambda _place: ScriptedMaker(self.script)))
        return self.backends[-1]


@pytest.fixture
def inline_engines() -> Iterator[InlineEngines]:
    """Lets jobs name the backend `inline`."""
    engines = InlineEngines()
    register_backend(BackendKind("inline", engines.open))
    yield engines
    unregister_backend("inline")


@pytest.fixture
def told_engine(tmp_path: Path) -> Callable[..., str]:
    """Makes an interpreter whose engine processes do as these settings say, see `told_engine.py`."""

    def make(**settings: object) -> str:
        told = tmp_path / f"told-{len(list(tmp_path.glob('told-*')))}"
        told.mkdir()
        (told / "settings.json").write_text(json.dumps(settings))
        script = REPOSITORY / "tests/execute/told_engine.py"
        interpreter = told / "interpreter"
        interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "{told / "settings.json"}" "$@"\n')
        interpreter.chmod(0o755)
        return str(interpreter)

    return make


@pytest.fixture(scope="session")
def group_is_gone() -> Callable[[int], bool]:
    """Whether no process of a group is left."""

    def gone(group: int) -> bool:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        return False

    return gone


@pytest.fixture(scope="session")
def vllm() -> Any:
    """vLLM with all that its engine imports; the test is skipped where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's and torch's own, while they are imported
        vllm = pytest.importorskip("vllm")
        importlib.import_module("vllm.v1.engine.llm_engine")  # what we use of it imports all the rest
        return vllm


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One ephemeral Prefect server for the session."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with (
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield
