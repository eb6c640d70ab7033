"""A stand-in for FlashAttention 3: the same calls in fp32 PyTorch, strict about what it is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch


@dataclass
class ReferenceVarlenAttention:
    """Attention of sequences over a paged cache, all queries of one seeing all its keys.

    Attributes:
        addresses: of all that came with the calls of `attend`, but the caches: a captured graph keeps them.
    """

    addresses: list[tuple[int, ...]] = field(default_factory=list)

    def scheduler_metadata(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        max_query_len: int,
        max_seq_len: int,
        causal: bool,
        splits: int,
    ) -> torch.Tensor:
        """What `attend` can check: lengths of queries and keys, and what it is to be called with."""
        assert query.dtype == key_cache.dtype
        assert query.shape[2] == key_cache.shape[3]
        numbers = torch.tensor([max_query_len, max_seq_len, causal, splits, *query.shape, *key_cache.shape[1:]])
        return torch.cat([numbers.int().to(seq_lens.device), query_start_loc.diff(), seq_lens])

    def attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        block_table: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        max_query_len: int,
        max_seq_len: int,
        scale: float,
        causal: bool,
        splits: int,
        metadata: torch.Tensor | None,
        output: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As FlashAttention 3, rows behind the last sequence are left alone."""
        assert not causal
        sequences = len(seq_lens)
        assert sequences > 0
        assert query_start_loc.shape == (sequences + 1,)
        assert len(block_table) == sequences
        assert {tensor.dtype for tensor in (block_table, query_start_loc, seq_lens)} == {torch.int32}
        assert metadata is not None
        made = self.scheduler_metadata(
            query, key_cache, query_start_loc, seq_lens,
            max_query_len=max_query_len, max_seq_len=max_seq_len, causal=causal, splits=splits,
        )  # fmt: skip
        assert metadata.tolist() == made.tolist()
        assert output is not None
        fixed = query, block_table, query_start_loc, seq_lens, metadata, output
        self.addresses.append(tuple(tensor.data_ptr() for tensor in fixed))
        lses = torch.full((query.shape[1], len(query)), torch.nan, device=query.device)
        block_size, kv_heads = key_cache.shape[1:3]
        lengths = seq_lens.tolist()
        for sequence, (start, end) in enumerate(pairwise(query_start_loc.tolist())):
            length = lengths[sequence]
            assert 0 <= end - start <= max_query_len
            assert 0 <= length <= max_seq_len
            if start == end:
                continue
            blocks = block_table[sequence, : -(-length // block_size)].long()
            keys, values = (cache[blocks].flatten(0, 1)[:length].float() for cache in (key_cache, value_cache))
            queries = query[start:end].float().unflatten(1, (kv_heads, -1))
            scores = torch.einsum("qngd,knd->ngqk", queries, keys) * scale
            result = torch.einsum("ngqk,knd->qngd", scores.softmax(-1), values)
            output[start:end] = result.flatten(1, 2).to(output.dtype)
            lses[:, start:end] = scores.logsumexp(-1).flatten(0, 1)
        return output, lses
