"""Which requests of a job have an answer that another run may take for its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchllm_operators.batch_sizes import NUMBERS_AT_A_TIME
from batchllm_operators.columns.arrays import UInt64s
from batchllm_operators.columns.request_keys import ascending_keys, key_words
from batchllm_operators.records import StageSummary
from batchllm_operators.specs.sampling import SamplingParameters
from batchllm_operators.store import Store
from batchllm_operators.work.staged import scan_part


def repeatable_keys(work: Store, stage: StageSummary, sampling: SamplingParameters, *, unseeded: bool) -> UInt64s:
    """The keys of staged requests whose answer does not change from run to run, distinct and ascending: uint64 [N, 2].

    Args:
        work: the work folder.
        stage: what staging found.
        sampling: of the job; rows may override it.
        unseeded: count requests that are sampled without a seed too.

    Raises:
        TerminalError: a staged part is missing or damaged.
    """
    keys = [np.zeros((0, 2), dtype=np.uint64), *_keys(work, stage, sampling, unseeded=unseeded)]
    return ascending_keys(np.concatenate(keys))


def _keys(work: Store, stage: StageSummary, sampling: SamplingParameters, *, unseeded: bool) -> Iterator[UInt64s]:
    @lru_cache(maxsize=1024)
    def repeats(override: str | None) -> bool:
        return unseeded or sampling.of_request(override, 1).deterministic

    for part in stage.parts:
        for batch in scan_part(work, part, ["request_key", "sampling"], NUMBERS_AT_A_TIME):
            overrides = pc.dictionary_encode(batch.column("sampling"))
            of_code = pa.array([repeats(one) for one in overrides.dictionary.to_pylist()], pa.bool_())
            chosen = of_code.take(overrides.indices).fill_null(repeats(None))
            keys = batch.column("request_key").filter(pc.and_(chosen, batch.column("request_key").is_valid()))
            yield key_words(keys)
