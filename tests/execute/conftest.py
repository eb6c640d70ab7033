"""Work folders with bundles to compute, and small engines to compute them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchllm_flows.demo.s3_server import S3Server
from batchllm_operators.execute.engine_work import EngineWork
from batchllm_operators.execute.messages import Load, Run
from batchllm_operators.records import BundleInfo
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.execution import ExecutionSpec, ModelSpec
from batchllm_operators.specs.sampling import SamplingParameters
from batchllm_operators.store import Store
from batchllm_operators.work.bundles import BUNDLE_SCHEMA
from batchllm_operators.work.layout import PLAN_FOLDER
from tests.execute.engines import StartedEngine, local_engine
from tests.generation import RESULT_SCHEMA

BLOCK_SIZE = 32
PREFIX = list(range(1000, 1000 + 2 * BLOCK_SIZE))


class WorkFolder:
    """A work folder: writes bundles as the planner does, reads parts as the merge does."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @staticmethod
    def key(number: int) -> bytes:
        """Key of the request with this number."""
        return blake2b(str(number).encode(), digest_size=16).digest()

    def write_bundle(
        self,
        name: str = "bundle-00000",
        *,
        requests: int = 12,
        max_tokens: int = 4,
        lengths: dict[int, int] | None = None,
        sampling: dict[int, str] | None = None,
        first: int = 0,
        long_rows: Collection[int] = (),
        long_tokens: int = 100_000,
    ) -> BundleInfo:
        """A bundle of prompts with a shared prefix of two blocks, numbered from `first`.

        `lengths`, `sampling`: of single requests; those at `long_rows` have `long_tokens` in place of `max_tokens`.
        """
        numbers = range(first, first + requests)
        prompts = [
            (PREFIX + [2000 + number] * 1000)[: (lengths or {}).get(number, len(PREFIX) + 5)] for number in numbers
        ]
        table = pa.table(
            {
                "request_key": [self.key(number) for number in numbers],
                "prompt_token_ids": prompts,
                "max_tokens": [long_tokens if row in long_rows else max_tokens for row in range(requests)],
                "sampling": [(sampling or {}).get(number) for number in numbers],
                "group_id": [0] * requests,
                "prefix_tokens": [len(PREFIX)] * requests,
                "expected_output_tokens": [max_tokens] * requests,
            },
            schema=BUNDLE_SCHEMA,
        )
        path = f"{PLAN_FOLDER}/{name}.parquet"
        digest = self.store.write_table(path, table)
        return BundleInfo(
            name=path,
            requests=requests,
            groups=1,
            prompt_tokens=sum(map(len, prompts)),
            expected_computed_prompt_tokens=sum(map(len, prompts)),
            expected_output_tokens=requests * max_tokens,
            expected_seconds=1.0,
            digest=digest,
        )

    def engine_work(self, load: Load | None = None, **execution: Any) -> EngineWork:
        """What the engines of a run on this folder are to do."""
        return EngineWork(
            execution=ExecutionSpec(**execution),
            load=load or Load(model=ModelSpec(id="m"), block_size=BLOCK_SIZE, gpus=1, task="generate"),
            sampling=SamplingParameters(),
            work_uri=self.store.uri,
            storage=self.store.options,
        )

    def run_command(self, bundle: BundleInfo, **changes: object) -> Run:
        """The command to compute a bundle."""
        command = Run(
            bundle=bundle.name,
            digest=bundle.digest,
            work_uri=self.store.uri,
            storage=StorageOptions(),
            task="generate",
            sampling=SamplingParameters(),
            part_rows=1000,
            part_seconds=60,
        )
        return command.model_copy(update=changes)

    def read(self, parts: tuple[str, ...]) -> list[dict[str, Any]]:
        """Rows of result parts; their schema is checked."""
        rows: list[dict[str, Any]] = []
        for name in parts:
            with self.store.parquet(name) as file:
                table = file.read()
            assert table.schema == RESULT_SCHEMA
            rows += table.to_pylist()
        return rows

    def answers(self, parts: tuple[str, ...]) -> dict[int, dict[str, Any]]:
        """Rows of result parts by request number; a key that stands twice is an error."""
        rows = self.read(parts)
        by_key = {row["request_key"]: row for row in rows}
        assert len(by_key) == len(rows)
        return {number: by_key.pop(self.key(number)) for number in range(2000) if self.key(number) in by_key}


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    return WorkFolder(Store(str(tmp_path / "work")))


@pytest.fixture
def work_on_s3(bucket: str) -> WorkFolder:
    return WorkFolder(Store(f"{bucket}/work"))


@pytest.fixture(scope="session")
def tiny_model(tiny_llama: str) -> ModelSpec:
    """A model that loads in seconds and takes eight requests at a time."""
    return ModelSpec(
        id=tiny_llama,
        dtype="float32",
        max_model_len=512,
        engine_args={"enforce_eager": True, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 * 1024**2},
    )


@pytest.fixture(scope="session")
def load_command(tiny_model: ModelSpec) -> Load:
    return Load(model=tiny_model, block_size=BLOCK_SIZE, gpus=1, task="generate")


@pytest.fixture
def make_engine() -> Iterator[Callable[..., StartedEngine]]:
    """Starts engine processes with a driver each, which are closed at the end of the test."""
    with ExitStack() as ending:
        yield lambda **changes: ending.enter_context(local_engine(**changes))


@pytest.fixture(scope="module")
def warm_engine(load_command: Load, s3_server: S3Server) -> Iterator[StartedEngine]:
    """One loaded engine for the tests of a module; it can reach the S3 server."""
    # A model that has learnt nothing writes white space without end where JSON allows it.
    compact = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
    model = load_command.model
    with local_engine(stall_s=120.0) as engine:
        engine.driver.load(
            load_command.model_copy(
                update={"model": model.model_copy(update={"engine_args": model.engine_args | compact})}
            )
        )
        yield engine
