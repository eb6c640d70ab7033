"""Has vLLM's model runners keep, or tell of, their block tables on the host; names what of them may move.

- V2 runner (`v1/worker/gpu`): `BlockTables` writes block ids to the device and forgets them. Its one method that takes
  them, `append_block_ids`, writes them to a mirror too; rows are never reset but written anew from their first column.
  `gather_block_tables` makes a step's table of them, `get_dummy_block_tables` makes one up.
- V1 runner (`v1/worker/gpu_model_runner.py`): `BlockTable` is a host array that is copied to the device for each step,
  also for dummy runs; `get_device_tensor` hands on the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from batchllm_kernels.vllm_plugin.block_table_mirror import BlockTableMirror, HostTable, note

_MIRROR = "_batchllm_mirror"
_EXTENDED = "_batchllm_extended"


def keep_host_tables(vllm_config: Any) -> None:
    """Prepares the model runner of an engine for `rows_of_step`; to be called before its block tables are made.

    What is changed are classes of this process, once; the other engines of the process keep mirrors in vain.

    Raises:
        ValueError: the engine has no model runner that can be prepared.
    """
    _check(vllm_config)
    if vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu.block_table import BlockTables

        _extend(BlockTables, "__init__", _make_with_mirror)
        _extend(BlockTables, "append_block_ids", _append_to_both)
        _extend(BlockTables, "gather_block_tables", _gather_with_note)
        _extend(BlockTables, "get_dummy_block_tables", _make_up_with_note)
    else:
        from vllm.v1.worker.block_table import BlockTable

        _extend(BlockTable, "get_device_tensor", _hand_on_with_note)


def _check(vllm_config: Any) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.worker.gpu_worker import Worker

    parallel = vllm_config.parallel_config
    worker = parallel.worker_cls
    if isinstance(worker, str):
        worker = resolve_obj_by_qualname(worker)
    known = issubclass(worker, Worker)
    if not known:
        raise ValueError(
            f"worker_cls: expected a kind of {Worker.__module__}.{Worker.__name__} for prefix-shared attention, whose "
            f"model runners have their block tables on the host, got {worker.__module__}.{worker.__name__}"
        )
    if parallel.use_ubatching:
        raise ValueError("enable_dbo, ubatch_size: prefix-shared attention does not support micro-batches")


def _extend(owner: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if hasattr(original, _EXTENDED):
        return

    @wraps(original)
    def extended(*args: Any, **options: Any) -> Any:
        return around(original, *args, **options)

    setattr(extended, _EXTENDED, True)
    setattr(owner, name, extended)


def _make_with_mirror(original: Callable[..., None], tables: Any, *args: Any, **options: Any) -> None:
    original(tables, *args, **options)
    setattr(tables, _MIRROR, BlockTableMirror([tuple(one.gpu.shape) for one in tables.block_tables]))


def _append_to_both(
    original: Callable[..., None],
    tables: Any,
    req_index: int,
    new_block_ids: Sequence[Sequence[int]],
    overwrite: bool,
) -> None:
    original(tables, req_index, new_block_ids, overwrite)
    mirror: BlockTableMirror | None = getattr(tables, _MIRROR, None)
    if mirror is None:
        return  # made before we came; `_gather_with_note` leaves its tables without a note
    for group in range(len(mirror.tables)):
        block_ids = new_block_ids[group]
        if tables.redirect_writes_to_null_block:
            block_ids = [0] * len(block_ids)
        mirror.write(group, req_index, int(tables.num_blocks.np[group, req_index]) - len(block_ids), block_ids)


def _gather_with_note(
    original: Callable[..., tuple[torch.Tensor, ...]], tables: Any, *args: Any, **options: Any
) -> tuple[torch.Tensor, ...]:
    gathered = original(tables, *args, **options)
    mirror: BlockTableMirror | None = getattr(tables, _MIRROR, None)
    if mirror is not None:
        for table, blocks in zip(gathered, mirror.tables, strict=True):
            note(table, HostTable(blocks, by_request=True))
    return gathered


def _make_up_with_note(
    original: Callable[..., tuple[torch.Tensor, ...]], tables: Any, *args: Any, **options: Any
) -> tuple[torch.Tensor, ...]:
    made = original(tables, *args, **options)
    for table in made:
        note(table, HostTable(None))
    return made


def _hand_on_with_note(
    original: Callable[..., torch.Tensor], block_table: Any, *args: Any, **options: Any
) -> torch.Tensor:
    table = original(block_table, *args, **options)
    note(table, HostTable(block_table.get_numpy_array()))
    return table
