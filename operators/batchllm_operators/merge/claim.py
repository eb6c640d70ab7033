"""Who writes a sink: one run of one job at a time, under a claim that others can see.

`_in_progress.json` names the job and a token of the run. It is taken before the first file is written, and the manifest
is written only while it is still the run's own. Names of output files carry job and token, so that not even a run that
was stopped for hours and goes on can touch the files of another.
"""

from __future__ import annotations

import re
from types import TracebackType
from typing import Any, Literal
from uuid import uuid4

import orjson

from batchllm_operators.errors import BatchLLMError, TerminalError, TransientError
from batchllm_operators.keys import canonical_json
from batchllm_operators.records import Manifest
from batchllm_operators.store import Store
from batchllm_operators.work.layout import MANIFEST_FILE

IN_PROGRESS_FILE = "_in_progress.json"
ADVICE = "choose another sink.uri, or set sink.mode to overwrite"

_DATA_FILE = re.compile(r"part-[^/]*")
_OUR_FILE = re.compile(r"part-\d+-(?P<job_id>[^/]+)-(?P<token>[0-9a-f]{8})(\.[a-z0-9]+)+")
_ATTEMPTS = 5


class LostClaimError(TerminalError):
    """Another run has claimed the sink meanwhile: what this one has written is not the output."""


class SinkClaim:
    """The claim of one run; a context manager.

    A block that is left by an exception leaves nothing of this run behind, and the old output as it was.

    Args:
        sink: the folder of the output.
        job_id: of the job.
        mode: of the sink part of the job: whether another job's claim stands in the way, or is taken over.
    """

    def __init__(self, sink: Store, job_id: str, mode: Literal["error", "overwrite"]) -> None:
        self._sink = sink
        self._job_id = job_id
        self._mode = mode
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
            found = self._sink.object(IN_PROGRESS_FILE)
            if self._mode == "error":
                refuse_claim_of_another(self._sink, self._job_id)
            if self._sink.write_if(IN_PROGRESS_FILE, self._content, found):
                return self
        raise TransientError("sink: other runs claim it at the same moment", job_id=self._job_id, uri=self._sink.uri)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Where the manifest is written the files are the output, whatever fails after it.
        if error is None or self._completed:
            return
        try:
            self._withdraw()
        except BatchLLMError as another:
            error.add_note(f"and files of this run may be left in the sink, which the next run removes: {another}")

    def file_name(self, number: int, ending: str) -> str:
        """Name of an output file, which no other run uses; names sort in the order of the rows.

        Args:
            number: of the file, from 0.
            ending: of the format's objects, without the dot.
        """
        return f"part-{number:05d}-{self._job_id}-{self._token}.{ending}"

    def require(self) -> None:
        """Look whether the claim is still this run's own.

        Raises:
            LostClaimError: it is not; names the job that has it.
        """
        if not self._is_own():
            owner = claimed_by(self._sink)
            whose = f"job {owner} has claimed it" if owner else "its claim is gone"
            raise LostClaimError(
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
            before, old = self._sink.object(MANIFEST_FILE), self._sink.content(MANIFEST_FILE)
            # After the look: what comes to stand there later, and is not taken back, is of a run that has the claim.
            self.require()
            if self._sink.write_if(MANIFEST_FILE, content, before):
                return old
            # A run that has lost its claim may have written its manifest and taken it back meanwhile.
        raise TransientError(
            "sink: other runs write its manifest at the same moment", job_id=self._job_id, uri=self._sink.uri
        )

    def _files_besides(self, manifest: Manifest) -> list[str]:
        """The output files in the folder that are in the way of this output."""
        kept = {file.name for file in manifest.files}
        others = [name for name in data_files(self._sink) if name not in kept]
        return others if self._mode == "overwrite" else [name for name in others if job_of_file(name) == self._job_id]

    def _take_back(self, content: bytes, old: bytes | None) -> None:
        """Put the old manifest, or none, in the place of this run's own, if that is still there."""
        mine = self._sink.object(MANIFEST_FILE)
        if self._sink.content(MANIFEST_FILE) != content:
            return
        if old is None:
            self._sink.delete([MANIFEST_FILE])
        else:
            self._sink.write_if(MANIFEST_FILE, old, mine)

    def release(self) -> None:
        """Give the claim up, if it is still this run's own."""
        if self._is_own():
            self._sink.delete([IN_PROGRESS_FILE])

    def _withdraw(self) -> None:
        mine = [name for name in data_files(self._sink) if self._token in name and job_of_file(name) == self._job_id]
        self._sink.delete(mine)
        self.release()

    def _is_own(self) -> bool:
        return self._sink.content(IN_PROGRESS_FILE) == self._content


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


def claimed_by(sink: Store) -> str | None:
    """Id of the job whose claim is there; None where there is none, or what is there is no claim of ours."""
    content = sink.content(IN_PROGRESS_FILE)
    if content is None:
        return None
    try:
        claim: Any = orjson.loads(content)
        return str(claim["job_id"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None


def data_files(sink: Store) -> list[str]:
    """Names of the output files that lie in the folder."""
    return [one.path for one in sink.objects("*") if _DATA_FILE.fullmatch(one.path)]


def job_of_file(name: str) -> str | None:
    """Id of the job that wrote an output file; None where its name tells none."""
    found = _OUR_FILE.fullmatch(name)
    return None if found is None else found["job_id"]
