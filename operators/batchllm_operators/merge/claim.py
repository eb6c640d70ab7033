"""Who writes a sink: one run of one job at a time, under a claim that others can see.

`_in_progress.json` names the job and a token of the run; of an output that is added to a sink it stands beside its
manifest. It is taken before the first file is written, and the manifest
is written only while it is still the run's own. Names of output files carry job and token, so that not even a run that
was stopped for hours and goes on can touch the files of another.
"""

from __future__ import annotations

import re
import time
from types import TracebackType
from typing import Any
from uuid import uuid4

import orjson

from batchllm_operators.errors import BatchLLMError, TerminalError, TransientError
from batchllm_operators.formats.input_objects import is_hidden
from batchllm_operators.keys import canonical_json
from batchllm_operators.records import Manifest
from batchllm_operators.specs.sink import SinkMode
from batchllm_operators.store import Store
from batchllm_operators.unfinished_removal import discard_unfinished
from batchllm_operators.unfinished_writes import UnfinishedWrite
from batchllm_operators.work.layout import MANIFESTS_FOLDER, WORK_FOLDER, manifest_name

IN_PROGRESS_FILE = "_in_progress.json"
ADVICE = "choose another sink.uri, or set sink.mode to overwrite"

_DATA_FILE = re.compile(r"part-[^/]*")
_OUR_FILE = re.compile(r"part-\d+-(?P<owner>[^/]+)-(?P<token>[0-9a-f]{8})(\.[a-z0-9]+)+")
_ATTEMPTS = 5
_LONG_AGO_S = 24 * 3600.0


class LostClaimError(TerminalError):
    """Another run has claimed the sink meanwhile: what this one has written is not the output."""


class SinkClaim:
    """The claim of one run; a context manager.

    A block that is left by an exception leaves nothing of this run behind, and the old output as it was.

    Args:
        sink: the folder of the output.
        job_id: of the job.
        mode: of the sink part of the job: whether another job's claim stands in the way, or is taken over.
        slice_id: of an output that is added to the sink: the claim is of that alone.
    """

    def __init__(self, sink: Store, job_id: str, mode: SinkMode, slice_id: str | None = None) -> None:
        self._sink = sink
        self._job_id = job_id
        self._mode = mode
        self._slice_id = slice_id
        self._owner = slice_id or job_id
        """Whose files the run's are, by their names."""
        self._token = uuid4().hex[:8]
        self._content = canonical_json({"job_id": job_id, "token": self._token})
        self._completed = False

    def __enter__(self) -> SinkClaim:
        """Take the claim.

        Raises:
            TerminalError: another job has it, and mode is `error`.
            TransientError: others take it at the same time, again and again.
        """
        for _ in range(_ATTEMPTS):
            found = self._sink.object(self._claim_name)
            if self._mode == "error":
                refuse_claim_of_another(self._sink, self._job_id)
            if self._sink.write_if(self._claim_name, self._content, found):
                discard_unfinished(self._sink, self._is_of_this_output)
                return self
        raise TransientError("sink: other runs claim it at the same moment", job_id=self._job_id, uri=self._sink.uri)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Where the manifest is written the files are the output, whatever fails after it.
        if error is None or self._completed:
            return
        try:
            # Who has the claim now may have removed what this run was writing.
            doubtful = isinstance(error, TerminalError) and not isinstance(error, LostClaimError)
            lost = self._loss() if doubtful else None
            self._withdraw()
        except BatchLLMError as another:
            error.add_note(f"and files of this run may be left in the sink, which the next run removes: {another}")
            return
        if lost is not None:
            raise lost from error

    @property
    def _claim_name(self) -> str:
        return claim_name(self._slice_id)

    @property
    def _manifest_name(self) -> str:
        return manifest_name(self._slice_id)

    def inputs_name(self) -> str:
        """Name of the object that lists the input of an output that is added to the sink; no other run uses it."""
        return f"{MANIFESTS_FOLDER}/{self._owner}-{self._token}.inputs.parquet"

    def file_name(self, number: int, ending: str) -> str:
        """Name of an output file, which no other run uses; names sort in the order of the rows.

        Args:
            number: of the file, from 0.
            ending: of the format's objects, without the dot.
        """
        return f"part-{number:05d}-{self._owner}-{self._token}.{ending}"

    def require(self) -> None:
        """Look whether the claim is still this run's own.

        Raises:
            LostClaimError: it is not; names the job that has it.
        """
        lost = self._loss()
        if lost is not None:
            raise lost

    def _loss(self) -> LostClaimError | None:
        """The error of a claim that is not this run's own any more; None: it still is."""
        if self._is_own():
            return None
        owner = claimed_by(self._sink, self._slice_id)
        whose = f"job {owner} has claimed it" if owner else "its claim is gone"
        return LostClaimError(
            f"sink: {whose} while this run was writing; nothing of this run is left there, and its answers are kept"
            " in the work folder",
            job_id=self._job_id,
            uri=self._sink.uri,
        )

    def complete(self, manifest: Manifest) -> None:
        """Make this run's files the output; only then do the files of an old one go, and the claim.

        Raises:
            LostClaimError: another run has claimed the sink, or completed it; the old output is as it was.
            TransientError: others write the manifest at the same time, again and again.
        """
        content = manifest.model_dump_json(indent=2).encode()
        old = self._replace_manifest(content)
        self._completed = True
        try:
            # Listed before the last look at the claim: whoever takes it after that look has written nothing yet.
            others = self._files_besides(manifest)
            self.require()
        except LostClaimError:
            # It was lost between the look and the write: whoever has it finds the sink as it was.
            self._take_back(content, old)
            self._completed = False
            raise
        self._sink.delete(others)
        self.release()

    def _replace_manifest(self, content: bytes) -> bytes | None:
        """Write this run's manifest; returns what stood in its place, or None."""
        for _ in range(_ATTEMPTS):
            before, old = self._sink.object(self._manifest_name), self._sink.content(self._manifest_name)
            # After the look: what comes to stand there later, and is not taken back, is of a run that has the claim.
            self.require()
            if self._sink.write_if(self._manifest_name, content, before):
                return old
            # A run that has lost its claim may have written its manifest and taken it back meanwhile.
        raise TransientError(
            "sink: other runs write its manifest at the same moment", job_id=self._job_id, uri=self._sink.uri
        )

    def _files_besides(self, manifest: Manifest) -> list[str]:
        """The output files in the folder that are in the way of this output."""
        kept = {file.name for file in manifest.files}
        others = [name for name in self._data_files() if name not in kept]
        if self._mode == "overwrite":
            return others
        return [name for name in others if owner_of_file(name) == self._owner] + self._inputs_besides(manifest)

    def _inputs_besides(self, manifest: Manifest) -> list[str]:
        """The lists of inputs that earlier runs of this output have left."""
        if self._slice_id is None:
            return []
        names = [name for name in self._sink.names(MANIFESTS_FOLDER) if name.endswith(".inputs.parquet")]
        ours = f"{MANIFESTS_FOLDER}/{self._owner}-"
        return [name for name in names if name.startswith(ours) and name != manifest.inputs]

    def _data_files(self) -> list[str]:
        return data_files(self._sink, with_folders=self._slice_id is not None)

    def _take_back(self, content: bytes, old: bytes | None) -> None:
        """Put the old manifest, or none, in the place of this run's own, if that is still there."""
        mine = self._sink.object(self._manifest_name)
        if self._sink.content(self._manifest_name) != content:
            return
        if old is None:
            self._sink.delete([self._manifest_name])
        else:
            self._sink.write_if(self._manifest_name, old, mine)

    def release(self) -> None:
        """Give the claim up, if it is still this run's own."""
        if self._is_own():
            self._sink.delete([self._claim_name])

    def _withdraw(self) -> None:
        mine = [name for name in self._data_files() if self._token in name and owner_of_file(name) == self._owner]
        inputs = [] if self._slice_id is None else [self.inputs_name()]
        self._sink.delete([*mine, *inputs])
        self.release()

    def _is_of_this_output(self, write: UnfinishedWrite) -> bool:
        """Whether what was begun is of an earlier run of this output, or so old that nobody writes it any more."""
        own = owner_of_file(write.name) == self._owner
        if own or (self._slice_id is not None and write.name.startswith(f"{MANIFESTS_FOLDER}/{self._owner}")):
            return True
        return not write.name.startswith(f"{WORK_FOLDER}/") and time.time() - write.began > _LONG_AGO_S

    def _is_own(self) -> bool:
        return self._sink.content(self._claim_name) == self._content


def refuse_claim_of_another(sink: Store, job_id: str) -> None:
    """Refuse a folder that another job has claimed.

    Raises:
        TerminalError: names both jobs.
    """
    owner = claimed_by(sink)
    if owner not in (None, job_id):
        raise TerminalError(
            f"sink: is claimed by job {owner}, which writes it now or was stopped, this is job {job_id}; {ADVICE}",
            uri=sink.uri,
        )


def claim_name(slice_id: str | None) -> str:
    """Name of the claim of an output in its sink; `slice_id` as for `manifest_name`."""
    return IN_PROGRESS_FILE if slice_id is None else f"{MANIFESTS_FOLDER}/{slice_id}{IN_PROGRESS_FILE}"


def claimed_by(sink: Store, slice_id: str | None = None) -> str | None:
    """Id of the job whose claim is there; None where there is none, or what is there is no claim of ours."""
    content = sink.content(claim_name(slice_id))
    if content is None:
        return None
    try:
        claim: Any = orjson.loads(content)
        return str(claim["job_id"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None


def data_files(sink: Store, *, with_folders: bool = False) -> list[str]:
    """Names of the output files that lie in the folder, or below it too, but for hidden folders."""
    names = [one.path for one in sink.objects("" if with_folders else "*")]
    return [name for name in names if _DATA_FILE.fullmatch(name.rpartition("/")[2]) and not is_hidden(name)]


def owner_of_file(name: str) -> str | None:
    """Id of the job, or of the slice, that an output file belongs to; None where its name tells none."""
    found = _OUR_FILE.fullmatch(name.rpartition("/")[2])
    return None if found is None else found["owner"]
