"""Kept answers of one model and one task, in immutable segments that runs add, look keys up in, and join.

A segment is three objects: `{id}.answers.parquet`, answers in the order they were computed in, so that those of one
input file stand together and are read together; `{id}.filter`, a Bloom filter of their keys; and, last, because it
makes the segment count, `{id}.keys.parquet`, the sorted keys with the row of each. A lookup reads all filters, the keys
of segments whose filter has any, and the row groups of answers that hold what was found.

`{job_id}.parts.json` lists the result parts of a job that are kept, so that none is kept twice.

What cannot be read is set aside with a warning: its answers are computed again. A segment that another run has joined
with others in the meantime is passed over for the same reason.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from batchllm_operators.answers.key_filter import LEAST_BITS, KeyFilter
from batchllm_operators.columns.arrays import Int64s, UInt64s
from batchllm_operators.columns.request_keys import distinct_keys, find_in_sorted, key_words
from batchllm_operators.digests import digest_of_bytes
from batchllm_operators.errors import DamagedObjectError, TerminalError
from batchllm_operators.keys import canonical_json
from batchllm_operators.models.model_files import model_versions
from batchllm_operators.parquet_objects import parquet_writer
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.store import Store
from batchllm_operators.store_entries import StoredObject
from batchllm_operators.tasks.base import Task
from batchllm_operators.unfinished_removal import discard_unfinished
from batchllm_operators.work.damage import set_aside
from batchllm_operators.work.results import result_schema

FORMAT = 1
ROWS_PER_GROUP = 1_000
"""Answers that are read together: with completions of some hundred tokens about a megabyte."""
ROWS_PER_READ = 32_000
MOST_SEGMENTS = 16
"""Segments from which on the smaller ones are joined: each costs a lookup two requests to the store."""
MOST_ROWS = 5_000_000
"""Answers of a joined segment: its keys are held in memory while it is made."""

KEYS_SCHEMA = pa.schema([("first", pa.uint64()), ("second", pa.uint64()), ("row", pa.int64())])

_ANSWERS, _FILTER, _KEYS, _PARTS = ".answers.parquet", ".filter", ".keys.parquet", ".parts.json"
_TIME = "%Y%m%dT%H%M%S"
_SCOPE = "/[0-9a-f]{32}/"
_OF_SEGMENT = re.compile(
    rf"{_SCOPE}(?P<time>[0-9]{{8}}T[0-9]{{6}})-[0-9a-f]{{12}}({'|'.join(map(re.escape, (_ANSWERS, _FILTER, _KEYS)))})$"
)

_LOGGER = logging.getLogger(__name__)


def answers_scope(model: ModelSpec, dtype: str, task: str, job_name: str | None = None) -> str:
    """What an answer depends on beside its request, as the name of a folder, 32 hex digits.

    The whole model part of the job counts, weights, dtype, quantisation, attention and every engine argument included.

    Args:
        model: the model part of the job.
        dtype: that engines compute in, where `model.dtype` leaves it to the machine.
        task: what the model does.
        job_name: keeps the answers of jobs of this name to themselves; None: all jobs share them.

    Raises:
        TerminalError: a file of the model cannot be read, see `model_versions`.
    """
    content: Mapping[str, Any] = {
        "format": FORMAT,
        "model": model.model_dump(mode="json"),
        "versions": model_versions(model),
        "dtype": dtype,
        "task": task,
        "job": job_name,
    }
    return digest_of_bytes(canonical_json(content))


class AnswerStore:
    """The kept answers in one folder.

    Args:
        folder: of one `answers_scope`.
        task: of the answers.
    """

    def __init__(self, folder: Store, task: Task) -> None:
        self._folder = folder
        self._schema = result_schema(task)

    @property
    def uri(self) -> str:
        """The folder, for messages."""
        return self._folder.uri

    def segments(self) -> list[str]:
        """Ids of the segments, the newest first."""
        names = self._folder.names()
        return sorted((name.removesuffix(_KEYS) for name in names if _is_segment(name)), reverse=True)

    def add(self, tables: Iterable[pa.Table]) -> int:
        """Keep answers as a new segment; the first of several with one key counts.

        Args:
            tables: of the task's `result_schema`, without errors.

        Returns:
            The number of answers.
        """
        return self._write(f"{datetime.now(UTC):{_TIME}}-{uuid4().hex[:12]}", tables)

    def find(self, keys: UInt64s) -> Iterator[pa.Table]:
        """The kept answers to some requests, each once; tables of `result_schema` of at most `ROWS_PER_READ` rows.

        Args:
            keys: uint64 [N, 2], distinct.

        Raises:
            TransientError: the store does not answer.
        """
        for segment in self.segments():
            if not len(keys):
                return
            found = np.zeros(len(keys), dtype=np.bool_)
            try:
                for which, table in self._in_segment(segment, keys):
                    found[which] = True
                    yield table
            except DamagedObjectError as error:
                self._set_aside(segment, error)
            except TerminalError as error:
                _LOGGER.info("kept answers %s are passed over: %s", segment, error.message)
            keys = keys[~found]

    def parts_of(self, job_id: str) -> list[str]:
        """Names of the result parts of a job that are kept."""
        try:
            return _kept_parts(self._folder, job_id + _PARTS)
        except DamagedObjectError as error:
            set_aside(self._folder, job_id + _PARTS, error)
            return []

    def note_parts(self, job_id: str, parts: Iterable[str]) -> None:
        """Note which result parts of a job are kept, in the place of what was noted before."""
        self._folder.write_bytes(job_id + _PARTS, orjson.dumps(list(parts)))

    def join_small_segments(self) -> None:
        """Join the smaller segments where there are many; the answers stay, and each is kept once.

        What a run that was cut off has left of a segment goes a day later.
        """
        self._delete_remains()
        segments = self.segments()
        if len(segments) < MOST_SEGMENTS:
            return
        rows = {segment: self._folder.parquet_schema(segment + _KEYS)[1] for segment in segments}
        chosen: list[str] = []
        for segment in sorted(segments, key=lambda one: rows[one])[: MOST_SEGMENTS - 2]:
            if sum(rows[one] for one in chosen) + rows[segment] <= MOST_ROWS:
                chosen.append(segment)
        if len(chosen) < 2:
            return
        newest_first = sorted(chosen, reverse=True)
        # Named by the newest, so that nothing goes by its age before its time.
        name = f"{newest_first[0].partition('-')[0]}-{uuid4().hex[:12]}"
        self._write(name, (table for segment in newest_first for table in self._all_of(segment)))
        self._delete(chosen)

    def delete_older(self, days: float) -> int:
        """Delete the segments that were kept longer ago than this many days; returns how many."""
        old = old_answers(self._folder.uri, self._folder.stored_objects(), datetime.now(UTC) - timedelta(days=days))
        self._folder.delete([one.path for one in old])
        return sum(one.path.endswith(_KEYS) for one in old)

    def _write(self, segment: str, tables: Iterable[pa.Table]) -> int:
        known: list[UInt64s] = [np.zeros((0, 2), dtype=np.uint64)]
        try:
            with self._folder.writer(segment + _ANSWERS) as file, parquet_writer(file, self._schema) as writer:
                for table in tables:
                    known.append(key_words(table["request_key"].combine_chunks()))
                    writer.write_table(table, row_group_size=ROWS_PER_GROUP)
            keys = np.concatenate(known)
            rows, _ = distinct_keys(keys)
            if len(rows):
                ordered = rows[np.lexsort((keys[rows, 1], keys[rows, 0]))]
                self._folder.write_bytes(segment + _FILTER, KeyFilter.of(keys[rows]).content)
                columns = [pa.array(keys[ordered, 0]), pa.array(keys[ordered, 1]), pa.array(ordered)]
                self._folder.write_table(segment + _KEYS, pa.table(columns, schema=KEYS_SCHEMA))
                return len(rows)
        except BaseException:
            self._delete([segment])
            raise
        self._delete([segment])
        return 0

    def _in_segment(self, segment: str, keys: UInt64s) -> Iterator[tuple[Int64s, pa.Table]]:
        """The answers to some keys that a segment has, and which of the keys these are."""
        candidates = np.flatnonzero(_key_filter(self._folder, segment + _FILTER).may_have(keys))
        if not len(candidates):
            return
        with self._folder.parquet(segment + _KEYS) as file:
            self._refuse_other_schema(segment, file, KEYS_SCHEMA)
            index = file.read()
        kept = np.stack([index["first"].to_numpy(), index["second"].to_numpy()], axis=1)
        place = find_in_sorted(keys[candidates], kept)
        which, rows = candidates[place >= 0], index["row"].to_numpy()[place[place >= 0]]
        in_order = np.argsort(rows)
        which, rows = which[in_order], rows[in_order]
        with self._folder.parquet(segment + _ANSWERS) as file:
            self._refuse_other_schema(segment, file, self._schema)
            if len(rows) and not 0 <= rows[0] <= rows[-1] < file.metadata.num_rows:
                raise DamagedObjectError("its keys are of other answers", uri=self._folder.uri_of(segment))
            begin = 0
            for table in _rows_of(file, rows):
                asked = which[begin : begin + len(table)]
                if (key_words(table["request_key"].combine_chunks()) != keys[asked]).any():
                    raise DamagedObjectError("its answers are to other requests", uri=self._folder.uri_of(segment))
                yield asked, table
                begin += len(table)

    def _all_of(self, segment: str) -> Iterator[pa.Table]:
        try:
            with self._folder.parquet(segment + _ANSWERS) as file:
                self._refuse_other_schema(segment, file, self._schema)
                for batch in file.iter_batches(batch_size=ROWS_PER_READ):
                    yield pa.Table.from_batches([batch])
        except DamagedObjectError as error:
            self._set_aside(segment, error)

    def _refuse_other_schema(self, segment: str, file: pq.ParquetFile, schema: pa.Schema) -> None:
        if not file.schema_arrow.equals(schema):
            raise DamagedObjectError("not a segment of kept answers", uri=self._folder.uri_of(segment))

    def _set_aside(self, segment: str, error: DamagedObjectError) -> None:
        for suffix in (_KEYS, _FILTER, _ANSWERS):
            set_aside(self._folder, segment + suffix, error)

    def _delete_remains(self) -> None:
        names = self._folder.names()
        begun = {name.removesuffix(suffix) for name in names for suffix in (_ANSWERS, _FILTER) if name.endswith(suffix)}
        a_day_ago = datetime.now(UTC) - timedelta(days=1)
        discard_unfinished(self._folder, lambda write: write.began < a_day_ago.timestamp())
        stamp, whole = f"{a_day_ago:{_TIME}}", set(self.segments())
        self._delete([one for one in begun - whole if "/" not in one and one.partition("-")[0] < stamp])

    def _delete(self, segments: list[str]) -> None:
        for segment in segments:
            self._folder.delete([segment + _KEYS, segment + _FILTER, segment + _ANSWERS])


def old_answers(uri: str, objects: Iterable[StoredObject], before: datetime) -> list[StoredObject]:
    """The objects of the segments in a folder that were kept before a time.

    Only what has a name of ours, in a folder of a scope, is taken for one of them. The notes of jobs stay: without
    them their answers would be kept anew from work folders that are still there.

    Args:
        uri: of a folder of one scope, or above those of several.
        objects: all that is in the folder.
        before: with a time zone.

    Returns:
        In the order in which they are to be deleted: the keys, which make a segment count, first.
    """
    stamp = f"{before.astimezone(UTC):{_TIME}}"
    old = []
    for one in objects:
        segment = _OF_SEGMENT.search(f"/{uri}/{one.path}")
        if segment is not None and segment["time"] < stamp:
            old.append(one)
    return sorted(old, key=lambda one: not one.path.endswith(_KEYS))


def check_answers_object(folder: Store, name: str) -> None:
    """Look whether an object beside the Parquet objects of kept answers is what was written.

    Args:
        folder: above it.
        name: of the object there; of other objects nothing is known.

    Raises:
        DamagedObjectError: it is not.
    """
    if name.endswith(_FILTER):
        _key_filter(folder, name)
    elif name.endswith(_PARTS):
        _kept_parts(folder, name)


def _key_filter(folder: Store, name: str) -> KeyFilter:
    bits = folder.content(name)
    if bits is None:
        raise TerminalError("its filter is gone", uri=folder.uri_of(name))
    if 8 * len(bits) < LEAST_BITS:
        raise DamagedObjectError(f"expected a filter, got {len(bits)} bytes", uri=folder.uri_of(name))
    return KeyFilter(bits)


def _kept_parts(folder: Store, name: str) -> list[str]:
    content = folder.content(name)
    try:
        names = [] if content is None else orjson.loads(content)
    except orjson.JSONDecodeError:
        names = None
    if not isinstance(names, list):
        raise DamagedObjectError("expected a list of names", uri=folder.uri_of(name))
    return [str(one) for one in names]


def _is_segment(name: str) -> bool:
    return name.endswith(_KEYS) and "/" not in name


def _rows_of(file: pq.ParquetFile, rows: Int64s) -> Iterator[pa.Table]:
    """Rows of a Parquet object by their numbers, which ascend; only row groups that hold some are read."""
    sizes = np.array([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)], dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    group_of = np.searchsorted(starts, rows, side="right") - 1
    begin = 0
    while begin < len(rows):
        # As many groups at a time as hold at most so many rows together; one at least.
        end = max(int(np.searchsorted(rows, rows[begin] + ROWS_PER_READ)), begin + 1)
        groups = np.unique(group_of[begin:end])
        table = file.read_row_groups(groups.tolist())
        shifted = rows[begin:end] - starts[group_of[begin:end]]
        in_table = np.concatenate(([0], np.cumsum(sizes[groups])))[np.searchsorted(groups, group_of[begin:end])]
        yield table.take(pa.array(in_table + shifted))
        begin = end
