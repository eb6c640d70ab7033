"""FlashAttention 3 as vLLM has it, from the library in vLLM's wheel, beside any torch: the rival on Hopper.

`scripts/fa3_library.py` takes the library out of the wheel. Calls are those of vLLM's `flash_attn_varlen_func` with
`fa_version=3` and of its `FlashAttentionMetadataBuilder`; contract tests compare them with vLLM's source.
"""

from __future__ import annotations

import lzma
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

LIBRARY_VARIABLE = "BATCHLLM_FA3_LIBRARY"
SPLITS_IN_CUDA_GRAPHS = 32  # vLLM's flash_attn_max_num_splits_for_cuda_graph
SPLITS_BY_HEURISTIC = 0


class FlashAttention3UnavailableError(Exception):
    """The library is not given, or does not load here; the message says why."""


class FlashAttention3:
    """The operators of the library."""

    def __init__(self, path: Path | None = None) -> None:
        """Loads the library at `path`, or where `BATCHLLM_FA3_LIBRARY` says; a name that ends in `.xz` is unpacked.

        Raises:
            FlashAttention3UnavailableError: with the reason.
        """
        if path is None:
            if not os.environ.get(LIBRARY_VARIABLE):
                raise FlashAttention3UnavailableError(f"{LIBRARY_VARIABLE}: expected the path of the library, got none")
            path = Path(os.environ[LIBRARY_VARIABLE])
        try:
            _load(path)
        except (OSError, lzma.LZMAError) as error:
            raise FlashAttention3UnavailableError(f"{path}: {error} ({error.__cause__})") from error
        self._operators: Any = torch.ops._vllm_fa3_C

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
        """What vLLM's metadata builder has computed once a step: int32, how the work is divided."""
        return self._operators.get_scheduler_metadata(
            len(seq_lens),
            max_query_len,
            max_seq_len,
            query.shape[1],
            key_cache.shape[2],
            query.shape[2],
            query.shape[2],  # head size of the values
            query.dtype,
            seq_lens,
            query_start_loc,
            None,  # cu_seqlens_k
            None,  # cu_seqlens_k_new
            None,  # seqused_q
            None,  # cache_leftpad
            key_cache.shape[1],
            0,  # max_seqlen_k_new
            causal,
            -1,  # window_size
            -1,
            False,  # has_softcap
            splits,
            None,  # pack_gqa
            0,  # sm_margin
        )

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
        """Attention of sequences over a paged cache.

        Args:
            query: [tokens, heads, head_size], fp16 or bf16.
            key_cache, value_cache: [blocks, block_size, kv_heads, head_size].
            block_table: int32 [sequences, max_blocks].
            query_start_loc: int32 [sequences + 1].
            seq_lens: int32 [sequences].
            max_query_len, max_seq_len: upper bounds.
            scale: of the scores.
            causal: the last query token of a sequence is its last key; else every query sees every key.
            splits: upper bound of parts of a sequence, 0 for the library's choice.
            metadata: of `scheduler_metadata` for the same step, causality and splits.
            output: as query; new if None.

        Returns:
            The output, and the natural logarithm of the sum of exponentials, fp32 [heads, tokens].
        """
        result, lse, _, _ = self._operators.fwd(
            query,
            key_cache,
            value_cache,
            None,  # k_new
            None,  # v_new
            None,  # q_v
            output,
            query_start_loc,
            None,  # cu_seqlens_k
            None,  # cu_seqlens_k_new
            None,  # seqused_q
            seq_lens,
            max_query_len,
            max_seq_len,
            block_table,
            None,  # kv_batch_idx
            None,  # leftpad_k
            None,  # rotary_cos
            None,  # rotary_sin
            None,  # seqlens_rotary
            None,  # q_descale
            None,  # k_descale
            None,  # v_descale
            scale,
            causal,
            -1,  # window_size
            -1,
            0.0,  # softcap
            True,  # rotary_interleaved
            metadata,
            splits,
            None,  # pack_gqa
            0,  # sm_margin
            None,  # s_aux
            1,  # cp_world_size
            0,  # cp_rank
            None,  # cp_tot_seqused_k
        )
        return result, lse


def _load(path: Path) -> None:
    if path.suffix != ".xz":
        torch.ops.load_library(path)
        return
    with tempfile.TemporaryDirectory() as folder:  # once loaded, the library no longer needs its file's name
        unpacked = Path(folder) / path.stem
        with lzma.open(path) as source, unpacked.open("wb") as target:
            shutil.copyfileobj(source, target)
        torch.ops.load_library(unpacked)
