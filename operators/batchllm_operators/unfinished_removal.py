"""Removal of what killed runs have left, which is no reason to fail where a store does not allow it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from batchllm_operators.errors import BatchLLMError
from batchllm_operators.store import Store
from batchllm_operators.unfinished_writes import UnfinishedWrite
from batchllm_operators.wording import counted

_LOGGER = logging.getLogger(__name__)


def discard_unfinished(folder: Store, chosen: Callable[[UnfinishedWrite], bool] = lambda _write: True) -> int:
    """Remove what killed writers have left at and below a folder; that it fails is only warned of.

    Args:
        folder: to look in.
        chosen: which of the unfinished writes; default: all. Whoever writes one of them at this moment fails.

    Returns:
        The number of objects that were begun.
    """
    try:
        going = [write for write in folder.unfinished_writes() if chosen(write)]
        folder.discard_writes(going)
    except BatchLLMError as error:
        # The rights to list and abort uploads (s3:ListBucketMultipartUploads, s3:AbortMultipartUpload) are no others'.
        _LOGGER.warning("uploads that killed runs have left are not looked for: %s", error.message)
        return 0
    if going:
        _LOGGER.info("removed what killed runs have left of %s in %s", counted(len(going), "object"), folder.uri)
    return len(going)
