"""Block tables on the host: what a metadata builder learns of a step, and that it is what stands on the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu_worker import Worker

from batchllm_kernels.vllm_plugin.block_table_mirror import BlockTableMirror, HostTable, note, rows_of_step
from batchllm_kernels.vllm_plugin.runner_tables import keep_host_tables
from tests.vllm_plugin import cpu_platform_plugin

REPOSITORY = Path(__file__).parent.parent.parent


def step(host: HostTable | None, requests: int, req_idx: list[int] | None = None) -> Any:
    """What a metadata builder is given, with a table on the device that notes the host's."""
    table = torch.zeros((requests, 8), dtype=torch.int32)
    if host is not None:
        note(table, host)
    rows = None if req_idx is None else np.array(req_idx, dtype=np.intp)
    return SimpleNamespace(block_table_tensor=table, num_reqs=requests, req_idx=rows)


def mirror() -> BlockTableMirror:
    made = BlockTableMirror([(4, 8), (4, 2)])
    made.write(0, 2, 0, [5, 6, 7])
    made.write(0, 0, 0, [5, 6])
    made.write(1, 2, 0, [9])
    return made


def rows(at: Any, columns: int) -> list[list[int]]:
    found = rows_of_step(at, columns)
    assert found is not None
    assert found.dtype == np.int32
    return [[int(block) for block in row] for row in found]


def test_each_group_has_rows_of_its_own_in_the_order_of_the_batch() -> None:
    first, second = (HostTable(table, by_request=True) for table in mirror().tables)
    assert rows(step(first, 2, [2, 0]), 3) == [[5, 6, 7], [5, 6, 0]]
    assert rows(step(second, 2, [2, 0]), 3) == [[9, 0], [0, 0]]


def test_a_row_is_written_on_from_a_column_or_anew() -> None:
    made = mirror()
    made.write(0, 2, 3, [8])
    made.write(0, 0, 0, [1])
    table = HostTable(made.tables[0], by_request=True)
    assert rows(step(table, 1, [2]), 4) == [[5, 6, 7, 8]]
    assert rows(step(table, 1, [0]), 1) == [[1]]


def test_more_blocks_than_a_row_holds_are_an_error() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        mirror().write(1, 0, 1, [3, 4])


def test_a_batch_that_is_padded_has_rows_of_nulls_at_its_end() -> None:
    table = HostTable(mirror().tables[0], by_request=True)
    assert rows(step(table, 4, [2, 0]), 2) == [[5, 6], [5, 6], [0, 0], [0, 0]]


def test_a_runner_whose_rows_stand_in_the_order_of_the_batch_needs_no_index() -> None:
    assert rows(step(HostTable(mirror().tables[0]), 3), 2) == [[5, 6], [0, 0], [5, 6]]


def test_nothing_is_learnt_from_a_table_that_was_made_up() -> None:
    assert rows_of_step(step(HostTable(None), 2, [0, 1]), 2) is None


def test_a_table_that_no_known_runner_made_is_an_error() -> None:
    with pytest.raises(LookupError, match="block table: expected one that a model runner also has on the host"):
        rows_of_step(step(None, 2, [0, 1]), 2)
    noted = step(HostTable(None), 2)
    noted.block_table_tensor = noted.block_table_tensor[:1]
    with pytest.raises(LookupError):
        rows_of_step(noted, 2)


def test_rows_that_only_an_index_finds_are_an_error_without_it() -> None:
    with pytest.raises(LookupError, match="req_idx: expected"):
        rows_of_step(step(HostTable(mirror().tables[0], by_request=True), 2), 2)


class ForeignWorker:
    """Of a platform that vLLM does not bring."""


def engine(*, worker: Any = Worker, micro_batches: bool = False, second_runner: bool = True) -> Any:
    parallel = SimpleNamespace(worker_cls=worker, use_ubatching=micro_batches)
    return SimpleNamespace(parallel_config=parallel, use_v2_model_runner=second_runner)


def test_an_engine_whose_runner_nobody_knows_is_refused_at_its_start() -> None:
    with pytest.raises(ValueError, match=r"worker_cls: expected a kind of vllm\.v1\.worker\.gpu_worker\.Worker .* got"):
        keep_host_tables(engine(worker=ForeignWorker))
    with pytest.raises(ValueError, match=r"got tests\.vllm_plugin\.test_block_table_mirror\.ForeignWorker"):
        keep_host_tables(engine(worker=f"{__name__}.ForeignWorker"))


def test_micro_batches_are_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="does not support micro-batches"):
        keep_host_tables(engine(micro_batches=True))


@pytest.mark.parametrize("second_runner", [False, True])
def test_a_runner_is_prepared_once_however_often_it_is_asked_for(second_runner: bool) -> None:
    from vllm.v1.worker.block_table import BlockTable
    from vllm.v1.worker.gpu.block_table import BlockTables

    config = engine(worker="vllm.v1.worker.cpu_worker.CPUWorker", second_runner=second_runner)
    keep_host_tables(config)
    prepared = BlockTable.get_device_tensor, BlockTables.append_block_ids, BlockTables.gather_block_tables
    keep_host_tables(config)
    assert prepared == (BlockTable.get_device_tensor, BlockTables.append_block_ids, BlockTables.gather_block_tables)


@pytest.fixture
def second_runners_tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own, of two KV cache groups, as its CPU worker has them; the kernel that gathers rows does nothing."""
    from vllm.v1.worker.cpu.buffer_utils import UvaBuffer
    from vllm.v1.worker.gpu import block_table, buffer_utils

    class NoKernel:
        def __getitem__(self, _grid: Any) -> Any:
            return lambda *_args, **_options: None

    monkeypatch.setattr(buffer_utils, "UvaBuffer", UvaBuffer)
    monkeypatch.setattr(block_table, "_gather_block_tables_kernel", NoKernel())
    keep_host_tables(engine(second_runner=True))
    return block_table.BlockTables([16, 32], 4, 64, [8, 4], torch.device("cpu"))


def of_requests(tables: Any, group: int, requests: list[int]) -> list[list[int]]:
    """Rows of a group's table as a metadata builder gets them for a step of these requests."""
    gathered = tables.gather_block_tables(torch.tensor(requests), num_reqs_padded=len(requests))
    index = np.array(requests, dtype=np.intp)
    metadata = SimpleNamespace(block_table_tensor=gathered[group], num_reqs=len(requests), req_idx=index)
    return rows(metadata, 3)


def test_what_the_second_runner_appends_stands_in_the_rows_of_each_group(second_runners_tables: Any) -> None:
    tables = second_runners_tables
    tables.append_block_ids(3, ([1, 2], [7]), overwrite=True)
    tables.append_block_ids(1, ([1, 5], [8]), overwrite=True)
    tables.append_block_ids(3, ([6], []), overwrite=False)
    assert of_requests(tables, 0, [1, 3]) == [[1, 5, 0], [1, 2, 6]]
    assert of_requests(tables, 1, [1, 3]) == [[8, 0, 0], [7, 0, 0]]
    tables.append_block_ids(3, ([9], [4]), overwrite=True)  # another request in its place
    tables.append_block_ids(3, ([10], [5]), overwrite=False)
    assert [row[:2] for group in (0, 1) for row in of_requests(tables, group, [3])] == [[9, 10], [4, 5]]


def test_blocks_that_vllm_redirects_to_the_null_block_are_so_on_the_host_too(
    second_runners_tables: Any,
) -> None:
    second_runners_tables.append_block_ids(0, ([1, 2], [3]), overwrite=True)
    second_runners_tables.redirect_writes_to_null_block = True
    second_runners_tables.append_block_ids(0, ([4, 5], [6]), overwrite=True)
    assert of_requests(second_runners_tables, 0, [0]) == [[0, 0, 0]]


def test_the_dummies_of_the_second_runner_are_told_from_its_steps(second_runners_tables: Any) -> None:
    for table in second_runners_tables.get_dummy_block_tables(2):
        metadata = SimpleNamespace(block_table_tensor=table, num_reqs=2, req_idx=np.arange(2))
        assert rows_of_step(metadata, 2) is None


def compared(model: str, *states: str, **variables: str) -> list[dict[str, Any]]:
    """Engines whose every step compares its rows of the host with those of the device."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm_plugin.compared_engine", model, *states],
        check=False, capture_output=True, text=True, timeout=500, cwd=REPOSITORY, env=os.environ | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def assert_alike_in_every_step(told: dict[str, Any]) -> None:
    """... of requests that were new, found a prefix, ran on, were preempted and came back, and finished."""
    assert len(told["steps"]) == told["scheduled"]
    assert {(one["made_up"], one["different"]) for one in told["steps"]} == {(0, 0)}
    assert max(one["requests"] for one in told["steps"]) == 4
    assert told["preempted"] >= 1
    assert told["hits"] >= 3
    assert told["finished"] >= 5


@pytest.mark.engine
def test_the_first_model_runner_has_on_the_host_what_is_on_the_device(tiny_llama: str) -> None:
    (told,) = compared(tiny_llama, "whole", VLLM_USE_V2_MODEL_RUNNER="0")
    assert told["runner"] == "vllm.v1.worker.cpu_model_runner"
    assert_alike_in_every_step(told)


@pytest.mark.engine
def test_the_second_model_runner_is_mirrored_and_a_mirror_that_misses_blocks_is_seen(
    tiny_llama: str, tmp_path: Path
) -> None:
    cpu_platform_plugin.announce(tmp_path / "platform")
    path = os.pathsep.join([str(tmp_path / "platform"), os.environ.get("PYTHONPATH", ""), str(REPOSITORY)])
    variables = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    told, spoilt = compared(tiny_llama, "whole", "spoilt", **variables)
    assert told["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert_alike_in_every_step(told)
    assert any(one["different"] for one in spoilt["steps"])
