"""Launch parameters of the kernels by architecture, head size and dtype: a table in a file, nothing tuned at run time.

`python -m batchllm_kernels.bench --tune` measures a device and prints the entry to add.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

import torch

TABLE = "tuning.json"


@dataclass(frozen=True, slots=True)
class Tuning:
    """Launch parameters of the fused kernel.

    Attributes:
        narrow_tile_rows: rows (query tokens x heads of one KV head) of the tile of small items; a power of two >= 16.
        wide_tile_rows: rows of the tile of items with many query tokens.
        kv_tile_tokens: KV tokens of one step of the inner loop.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline over KV tiles.
    """

    narrow_tile_rows: int
    wide_tile_rows: int
    kv_tile_tokens: int
    num_warps: int
    num_stages: int

    def with_room_for(self, queries_per_kv_head: int) -> Tuning:
        """With tiles that hold one query token: all query heads of a KV head."""
        rows = 1 << (queries_per_kv_head - 1).bit_length()
        return replace(
            self,
            narrow_tile_rows=max(rows, self.narrow_tile_rows),
            wide_tile_rows=max(rows, self.wide_tile_rows),
        )


def tuning_for(architecture: str, head_size: int, dtype: torch.dtype) -> Tuning:
    """The table's entry; that of the next larger head size, and of `any` for an architecture that was not measured.

    Args:
        architecture: as `sm90`.
        head_size: numbers of a head.
        dtype: of the query and the cache.

    Raises:
        ValueError: for a head size larger than any in the table.
    """
    table = _table()
    entries = table.get(architecture, {}).get(_bits(dtype)) or table["any"][_bits(dtype)]
    sizes = sorted(size for size in entries if size >= head_size)
    if not sizes:
        raise ValueError(f"head_size: expected at most {max(entries)}, got {head_size}")
    return entries[sizes[0]]


def device_architecture(device: torch.device) -> str:
    """Architecture of a device as the table names it; `any` for a device without one."""
    if device.type != "cuda":
        return "any"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _bits(dtype: torch.dtype) -> str:
    return f"{dtype.itemsize * 8} bits"


@cache
def _table() -> dict[str, dict[str, dict[int, Tuning]]]:
    text = resources.files(__package__).joinpath(TABLE).read_text(encoding="utf-8")
    return {
        architecture: {
            bits: {int(size): Tuning(**entry) for size, entry in sizes.items()} for bits, sizes in by_bits.items()
        }
        for architecture, by_bits in json.loads(text)["entries"].items()
    }
