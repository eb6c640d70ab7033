"""Input that is not what it was: found by the versions of its objects, before it is read and after."""

from __future__ import annotations

from collections.abc import Sequence

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import Source
from batchllm_operators.records import InputObject
from batchllm_operators.wording import first_of


def refuse_changed_input(source: Source, objects: Sequence[InputObject], fingerprint: Sequence[InputObject]) -> None:
    """Refuse input that changed since the job began, whose id is that of the input it began with.

    Args:
        source: the input, for the message.
        objects: its objects as they are.
        fingerprint: as they were.

    Raises:
        TerminalError: names the objects that are gone, new or replaced.
    """
    before = {one.path: one for one in fingerprint}
    now = {one.path: one for one in objects}
    changes = [f"{path} is gone" for path in before if path not in now]
    changes += [f"{path} is new" for path in now if path not in before]
    changes += [f"{path} was replaced" for path in now if path in before and now[path] != before[path]]
    if changes:
        raise TerminalError(
            f"source: the input changed since the job began: {first_of(changes)};"
            " run the job again on what is there now",
            uri=source.spec.uri,
        )
