"""Block tables on the host, so that planning a step copies nothing from the device and waits for nothing.

`runner_tables` has vLLM's model runners note on each block table that they hand on, a device tensor, which rows of the
host it was made of. A metadata builder gets that tensor, and `rows_of_step` finds the rows by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from batchllm_kernels.arrays import Int32s

_NOTE = "_batchllm_host_table"


class BlockTableMirror:
    """What a runner writes to the block tables of all KV cache groups on its device, on the host.

    Attributes:
        tables: for each group int32 [requests, blocks]. What stands behind a request's blocks is of requests before it,
            as on the device.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        """`shapes`: requests and blocks of each group's table."""
        self.tables: list[Int32s] = [np.zeros(shape, dtype=np.int32) for shape in shapes]

    def write(self, group: int, request: int, start: int, block_ids: Sequence[int]) -> None:
        """Puts blocks into a request's row, from column `start` on.

        Raises:
            ValueError: the row is too short for them.
        """
        self.tables[group][request, start : start + len(block_ids)] = block_ids


@dataclass(frozen=True, slots=True)
class HostTable:
    """Where the rows of a block table on the device stand on the host.

    Attributes:
        blocks: int32 [rows, blocks], None for a table that was made up: dummy, profiling and capturing runs.
        by_request: a step's rows are picked by `CommonAttentionMetadata.req_idx`; else they are the first ones.
    """

    blocks: Int32s | None
    by_request: bool = False


def note(table: torch.Tensor, host: HostTable) -> None:
    """Remembers with a table on the device where its rows stand on the host; slices of it do not inherit that."""
    setattr(table, _NOTE, host)


def rows_of_step(common_attn_metadata: Any, columns: int) -> Int32s | None:
    """The block table of a step, from the host; None where it was made up, so that nothing may be learnt from it.

    It is int32 [requests, columns]. A row holds a request's blocks and, behind them, anything; so does all of a row
    that pads the batch. It may be a view of the runner's memory: it is not to be written, and the next step changes it.

    Args:
        common_attn_metadata: vLLM's `CommonAttentionMetadata`, as a metadata builder is given it.
        columns: blocks of the longest request.

    Raises:
        LookupError: the table is not of a model runner that notes the host's rows.
    """
    host: HostTable | None = getattr(common_attn_metadata.block_table_tensor, _NOTE, None)
    if host is None:
        raise LookupError("block table: expected one that a model runner also has on the host, got one made elsewhere")
    if host.blocks is None:
        return None
    requests: int = common_attn_metadata.num_reqs
    if not host.by_request:
        return host.blocks[:requests, :columns]
    of_step = common_attn_metadata.req_idx
    if of_step is None:
        raise LookupError("req_idx: expected the rows of the step's requests in the runner's tables, got None")
    rows: Int32s = host.blocks[of_step, :columns]
    if len(rows) < requests:  # padded to the size of a captured graph
        rows = np.concatenate([rows, np.zeros((requests - len(rows), rows.shape[1]), dtype=np.int32)])
    return rows
