"""The input objects that earlier runs have answered, so that a run can take those alone that are new.

Each output that is added to a sink lists its input beside its manifest, which names the list. What has been answered
is what complete outputs list: it moves when a run has completed, and only then, and goes with its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from batchllm_operators.errors import TerminalError
from batchllm_operators.merge.sink import all_manifests
from batchllm_operators.records import InputObject
from batchllm_operators.store import Store
from batchllm_operators.wording import first_of

_READERS = 16
_SCHEMA = pa.schema([pa.field("uri", pa.string(), nullable=False), pa.field("version", pa.string(), nullable=False)])

SeenInputs = frozenset[tuple[str, str]]
"""URI and version of each object."""


def write_inputs(sink: Store, name: str, folder: Store, objects: Iterable[InputObject]) -> None:
    """Write the list of an output.

    Args:
        sink: where it is written.
        name: of the list.
        folder: the store of the input.
        objects: the input.
    """
    rows = [{"uri": folder.uri_of(one.path), "version": one.version} for one in objects]
    sink.write_table(name, pa.Table.from_pylist(rows, _SCHEMA))


def seen_inputs(sink: Store, job_name: str, but_slice: str | None = None) -> SeenInputs:
    """What complete runs of jobs of this name have answered.

    Args:
        sink: the folder that outputs are added to.
        job_name: of the jobs.
        but_slice: an output that does not count.

    Raises:
        TerminalError: a manifest or a list is damaged, or written by another version.
    """
    manifests = [one for one in all_manifests(sink) if one.job_name == job_name and one.slice_id != but_slice]
    lists = [one.inputs for one in manifests if one.inputs is not None]
    with ThreadPoolExecutor(_READERS) as readers:
        return frozenset(pair for pairs in readers.map(lambda name: _pairs(sink, name), lists) for pair in pairs)


def refuse_inputs_seen_meanwhile(
    sink: Store, job_name: str, slice_id: str | None, folder: Store, objects: Iterable[InputObject]
) -> None:
    """Refuse to add the answers to objects that another run has answered while this one computed.

    Args:
        sink: the folder that outputs are added to.
        job_name: of the job.
        slice_id: of this run's own output.
        folder: the store of the input.
        objects: the input of this run.

    Raises:
        TerminalError: names the objects.
    """
    seen = seen_inputs(sink, job_name, but_slice=slice_id)
    twice = [one.path for one in objects if (folder.uri_of(one.path), one.version) in seen]
    if twice:
        raise TerminalError(
            f"source.new_objects_only: another run has answered {first_of(twice)} meanwhile; run the job again, which"
            " takes the others, and finds the answers that this run has computed",
            uri=sink.uri,
        )


def _pairs(sink: Store, name: str) -> Sequence[tuple[str, str]]:
    with sink.parquet(name) as file:
        table = file.read()
    return list(zip(table["uri"].to_pylist(), table["version"].to_pylist(), strict=True))
