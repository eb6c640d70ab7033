"""Identity of requests and jobs.

Both are BLAKE2b hashes, so that no crafted row or spec can take the place of another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from batchllm_operators.task_names import GENERATE

REQUEST_KEY_BYTES = 16


class RequestKeys:
    """Makes the keys of the requests of one model.

    Args:
        model_id: id or path of the model.
        revision: its revision, or None.
        task: what it does with each prompt. Generation is not named in its keys, which are older than the other tasks.
    """

    def __init__(self, model_id: str, revision: str | None, task: str = GENERATE) -> None:
        self._base = hashlib.blake2b(digest_size=REQUEST_KEY_BYTES, person=b"batchllm-request")
        made_by = {"model": model_id, "revision": revision} | ({} if task == GENERATE else {"task": task})
        self._base.update(_framed(canonical_json(made_by)))

    def key(
        self, prompt_token_ids: npt.NDArray[np.int32], sampling: Mapping[str, Any], *, row_index: int | None
    ) -> bytes:
        """Key of one request: 16 bytes over model, sampling parameters and token ids.

        Args:
            prompt_token_ids: int32, one per prompt token.
            sampling: the request's sampling parameters.
            row_index: given when sampling is not deterministic, so that equal rows get answers of their own.
        """
        digest = self._base.copy()
        digest.update(_framed(canonical_json({"sampling": sampling, "row_index": row_index})))
        digest.update(np.ascontiguousarray(prompt_token_ids, dtype="<i4").data)
        return digest.digest()


def job_id(spec: Mapping[str, Any], fingerprint: list[tuple[str, int, str]]) -> str:
    """Id of a job: 16 hex digits over its spec (JSON values; sink and execution left out) and its input.

    Args:
        spec: the parts of the spec that decide what is computed.
        fingerprint: (path, size in bytes, version) of each input object.
    """
    content = canonical_json({"spec": spec, "input": sorted(fingerprint)})
    return hashlib.blake2b(content, digest_size=8, person=b"batchllm-job").hexdigest()


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys: equal values give equal bytes."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _framed(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content
