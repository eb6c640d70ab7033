"""A decode step on a device, with random numbers and a KV cache of its own for each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchllm_kernels.bench.grid import MAX_CACHE_BYTES, GridPoint
from batchllm_kernels.bench.workloads import DecodeStep

LAYERS = 8
MOST_LAYERS = 64
L2_BYTES_OF_H100 = 50 * 1024**2
L2_SIZES_BETWEEN_USES = 4  # a layer's cache is used again when so much else was read, as in a model of many layers


@dataclass(frozen=True, slots=True)
class LayeredStep:
    """Tensors of one decode step; every row has one query token.

    Attributes:
        point: what it is a step of.
        step: block table and lengths on the host.
        query, output: [requests, heads, head_size]; one for all layers, as in a captured model.
        caches: for each layer keys and values, [blocks, block_size, kv_heads, head_size]: views of vLLM's
            `[blocks, kv_heads, block_size, 2 * head_size]`.
        block_table, seq_lens, query_start_loc: int32, on the device.
    """

    point: GridPoint
    step: DecodeStep
    query: torch.Tensor
    output: torch.Tensor
    caches: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.point.head_size**-0.5)

    @property
    def device(self) -> torch.device:
        """Bytes of all its tensors."""
        return self.query.device

    @property
    def layers(self) -> int:
        """Number of caches."""
        return len(self.caches)

    @property
    def unique_bytes(self) -> int:
        """Keys and values with every shared block counted once, queries and outputs: no kernel can move less."""
        return self.step.unique_kv_tokens * self.kv_token_bytes + self._query_bytes

    @property
    def dense_bytes(self) -> int:
        """The same where every request reads its whole context."""
        return int(self.step.seq_lens.sum()) * self.kv_token_bytes + self._query_bytes

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of the keys and values of one token in one layer."""
        return int(2 * self.point.kv_heads * self.point.head_size * self.query.itemsize)

    @property
    def _query_bytes(self) -> int:
        return int(2 * self.query.numel() * self.query.itemsize)


def layered_step(
    point: GridPoint, device: torch.device, dtype: torch.dtype, *, layers: int | None = None
) -> LayeredStep:
    """Random tensors for a point, the same for the same point; by default as many layers as `layer_count` says."""
    step = point.step()
    generator = torch.Generator(device).manual_seed(0)
    shape = (step.blocks, point.kv_heads, point.block_size, 2 * point.head_size)
    if layers is None:
        layers = layer_count(torch.Size(shape).numel() * dtype.itemsize, l2_bytes(device))
    caches = []
    for _ in range(layers):
        cache = torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)
        keys, values = cache.transpose(1, 2).split(point.head_size, dim=-1)
        caches.append((keys, values))
    query = torch.empty((len(step.seq_lens), point.heads, point.head_size), device=device, dtype=dtype)
    query.normal_(generator=generator)
    table, lengths, starts = (
        torch.from_numpy(array).to(device) for array in (step.block_table, step.seq_lens, step.query_start_loc)
    )
    return LayeredStep(point, step, query, torch.empty_like(query), tuple(caches), table, lengths, starts)


def layer_count(cache_bytes: int, second_level_bytes: int) -> int:
    """Layers to measure: eight, more where eight small caches would stay in the second-level cache, fewer where eight
    large ones do not fit `MAX_CACHE_BYTES`; at least one."""
    wanted = max(LAYERS, min(MOST_LAYERS, -(-L2_SIZES_BETWEEN_USES * second_level_bytes // cache_bytes)))
    return max(1, min(wanted, MAX_CACHE_BYTES // cache_bytes))


def l2_bytes(device: torch.device) -> int:
    """Size of the second-level cache; none for a device that is not CUDA."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", L2_BYTES_OF_H100))
