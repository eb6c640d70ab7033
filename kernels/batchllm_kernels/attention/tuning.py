"""Launch parameters of the kernels by architecture, head size and dtype: a table in a file, nothing tuned at run time.

`python -m batchllm_kernels.bench --tune` measures a device and prints the entries to add.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from math import gcd

import torch

TABLE = "tuning.json"
MULTIPROCESSORS_OF_H100 = 132
ROWS_OF_A_MATRIX_UNIT = 16  # rows that the smallest matrix instruction multiplies


@dataclass(frozen=True, slots=True)
class SharedTuning:
    """Launch parameters of the kernel of shared parts.

    Attributes:
        low_tile_rows: rows (query tokens x heads of one KV head) of the tile of items with few rows; a power of two.
        high_tile_rows: rows of the tile of the other items: no item has more.
        kv_tile_tokens: KV tokens of one step of the inner loop.
        num_warps: warps of a program.
        low_stages, high_stages: stages of the software pipeline over KV tiles, for either tile.
        programs_per_multiprocessor: programs that fit a multiprocessor at once.
    """

    low_tile_rows: int
    high_tile_rows: int
    kv_tile_tokens: int
    num_warps: int
    low_stages: int
    high_stages: int
    programs_per_multiprocessor: int = 2


@dataclass(frozen=True, slots=True)
class OwnTuning:
    """Launch parameters of the kernel of own parts.

    Attributes:
        most_kv_tile_tokens: KV tokens of one step of the inner loop, at most; a step lies within one block.
        num_warps: warps of a program.
        stages: stages of the software pipeline over KV tiles.
        programs_per_multiprocessor: programs that keep the memory of the device busy.
    """

    most_kv_tile_tokens: int
    num_warps: int
    stages: int
    programs_per_multiprocessor: int = 2

    def kv_tile_tokens(self, block_size: int) -> int:
        """KV tokens of a step for blocks of this size: a power of two that divides it."""
        return gcd(block_size, self.most_kv_tile_tokens)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Launch parameters for one architecture, head size and dtype."""

    shared: SharedTuning
    own: OwnTuning

    def with_room_for(self, queries_per_kv_head: int) -> Tuning:
        """With shared tiles that hold at least one query token: all query heads of a KV head."""
        rows = 1 << (queries_per_kv_head - 1).bit_length()
        low, high = (max(rows, one) for one in (self.shared.low_tile_rows, self.shared.high_tile_rows))
        # a tile of one token's heads has the width of a shared tile where there are that many
        warps = max(self.own.num_warps, rows // ROWS_OF_A_MATRIX_UNIT)
        return Tuning(
            replace(self.shared, low_tile_rows=low, high_tile_rows=high), replace(self.own, num_warps=min(warps, 8))
        )


def own_tile_rows(queries_per_kv_head: int) -> int:
    """Rows of the tile of an own item: the query heads of one KV head, at least what a matrix unit multiplies."""
    return max(ROWS_OF_A_MATRIX_UNIT, 1 << (queries_per_kv_head - 1).bit_length())


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
    entries = {**table["any"][_bits(dtype)], **table.get(architecture, {}).get(_bits(dtype), {})}
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


@cache
def multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a CUDA device; an H100's for any other, where plans are made and no kernel runs."""
    if device.type != "cuda":
        return MULTIPROCESSORS_OF_H100
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _bits(dtype: torch.dtype) -> str:
    return f"{dtype.itemsize * 8} bits"


@cache
def _table() -> dict[str, dict[str, dict[int, Tuning]]]:
    text = resources.files(__package__).joinpath(TABLE).read_text(encoding="utf-8")
    return {
        architecture: {
            bits: {
                int(size): Tuning(SharedTuning(**entry["shared"]), OwnTuning(**entry["own"]))
                for size, entry in sizes.items()
            }
            for bits, sizes in by_bits.items()
        }
        for architecture, by_bits in json.loads(text)["entries"].items()
    }
