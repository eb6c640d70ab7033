"""Two runs that write one sink at once: the manifest of one never stands over the rows of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm_operators.errors import TerminalError, TransientError
from batchllm_operators.merge.claim import IN_PROGRESS_FILE, LostClaimError, SinkClaim, data_files
from batchllm_operators.merge.merging import merge_results
from batchllm_operators.records import InputObject, Manifest
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.store import Store
from batchllm_operators.work.layout import MANIFEST_FILE
from tests.merge.conftest import Job, answer

Mode = Literal["error", "overwrite"]


class Writer:
    """One of two jobs that write the same sink; its answers carry its name."""

    def __init__(self, folder: Path, name: str, sink: Store) -> None:
        self.name = name
        self.sink = sink
        self.job = Job(folder / name, list(range(6)))
        self.job.add_results(*(answer(number, name) for number in range(6)))

    def merge(self, mode: Mode, in_the_middle: Callable[[], object] = lambda: None) -> Manifest:
        """Merge in files of two rows, and do something else between two of them."""
        source = self.job.source()
        tables = source.tables

        def interrupted(schema: pa.Schema, rows: None) -> Iterator[pa.Table]:
            whole = pa.concat_tables(tables(schema, rows))
            yield whole.slice(0, 3)
            in_the_middle()
            yield whole.slice(3)

        source.tables = interrupted  # type: ignore[method-assign]
        return merge_results(
            source,
            self.job.stage,
            self.job.work,
            self.sink,
            SinkSpec(uri=self.sink.uri, rows_per_file=2, mode=mode),
            job_id=self.name,
            job_name=self.name,
            fingerprint=self.job.fingerprint,
            max_error_fraction=0.0,
        )


@pytest.fixture
def sink(place: tuple[str, StorageOptions]) -> Store:
    return Store(*place)


@pytest.fixture
def first(tmp_path: Path, sink: Store) -> Writer:
    return Writer(tmp_path, "first", sink)


@pytest.fixture
def second(tmp_path: Path, sink: Store) -> Writer:
    return Writer(tmp_path, "second", sink)


def whose_output(sink: Store) -> str:
    """The job of the manifest, after a look that every row it lists is that job's, and that nothing else is there."""
    manifest = Manifest.model_validate_json(sink.read_bytes(MANIFEST_FILE))
    rows: list[dict[str, Any]] = []
    for file in manifest.files:
        content = sink.read_bytes(file.name)
        assert sink.digest(file.name) == file.digest
        rows += pq.read_table(pa.BufferReader(content)).to_pylist()
    assert [row["completion"] for row in rows] == [f"{manifest.job_id} {number}" for number in range(6)]
    return manifest.job_id


def only_output(sink: Store) -> str:
    manifest = Manifest.model_validate_json(sink.read_bytes(MANIFEST_FILE))
    assert set(data_files(sink)) == {file.name for file in manifest.files}
    assert not sink.exists(IN_PROGRESS_FILE)
    return whose_output(sink)


def test_a_second_job_is_refused_while_the_first_one_writes(sink: Store, first: Writer, second: Writer) -> None:
    def other() -> None:
        with pytest.raises(TerminalError, match=r"job first.*this is job second"):
            second.merge("error")

    first.merge("error", other)
    assert only_output(sink) == "first"
    with pytest.raises(TerminalError, match="output of job first"):
        second.merge("error")


def test_a_second_job_in_mode_overwrite_takes_the_sink_and_the_first_one_says_so(
    sink: Store, first: Writer, second: Writer
) -> None:
    with pytest.raises(LostClaimError, match="nothing of this run is left there"):
        first.merge("overwrite", lambda: second.merge("overwrite"))
    assert only_output(sink) == "second"


def test_a_first_job_that_goes_on_while_the_second_one_writes_stops_and_leaves_it_alone(
    sink: Store, first: Writer, second: Writer
) -> None:
    def take_over() -> None:
        with ThreadPoolExecutor(1) as thread:
            claim = SinkClaim(sink, "second", "overwrite").__enter__()
            thread.submit(sink.write_bytes, claim.file_name(0, "parquet"), b"being written").result()

    with pytest.raises(LostClaimError, match="job second has claimed it"):
        first.merge("overwrite", take_over)
    assert [name for name in data_files(sink) if "second" in name] == data_files(sink) != []
    second.merge("overwrite")
    assert only_output(sink) == "second"


def test_a_run_that_was_stopped_before_its_manifest_and_goes_on_later_does_not_replace_the_output(
    sink: Store, second: Writer
) -> None:
    with pytest.raises(LostClaimError), SinkClaim(sink, "first", "overwrite") as claim:
        sink.write_bytes(claim.file_name(0, "parquet"), b"rows of the first")
        manifest = second.merge("overwrite")
        claim.complete(manifest.model_copy(update={"job_id": "first"}))
    assert only_output(sink) == "second"


def test_two_runs_of_one_job_do_not_mix_their_files(sink: Store, first: Writer, tmp_path: Path) -> None:
    with pytest.raises(LostClaimError):
        first.merge("error", lambda: first.merge("error"))
    assert only_output(sink) == "first"


def test_the_old_output_stays_whole_until_the_new_one_is_complete(sink: Store, first: Writer, second: Writer) -> None:
    first.merge("error")
    seen: list[str] = []
    second.merge("overwrite", lambda: seen.append(whose_output(sink)))
    assert seen == ["first"]
    assert only_output(sink) == "second"


def test_an_overwrite_that_fails_leaves_the_old_output_and_nothing_else(
    sink: Store, first: Writer, second: Writer
) -> None:
    first.merge("error")

    def fail() -> None:
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        second.merge("overwrite", fail)
    assert only_output(sink) == "first"


def test_a_store_that_fails_after_the_manifest_is_written_costs_no_output(
    sink: Store, first: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Store, names: list[str]) -> None:
        raise TransientError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", fail)
        with pytest.raises(TransientError, match="no answer"):
            first.merge("overwrite")
    assert whose_output(sink) == "first"
    assert first.merge("overwrite").job_id == "first"


def test_of_many_that_claim_at_once_only_one_still_holds_the_claim(sink: Store) -> None:
    def claim(number: int) -> SinkClaim | None:
        try:
            return SinkClaim(sink, f"job-{number}", "error").__enter__()
        except TerminalError:
            return None

    with ThreadPoolExecutor(6) as runs:
        claims = [made for made in runs.map(claim, range(6)) if made is not None]
    held = 0
    for one in claims:
        try:
            one.require()
        except LostClaimError:
            continue
        held += 1
    assert held == 1


PATIENCE_S = 60


class Pause:
    """A place where one thread stops until another lets it go on."""

    def __init__(self) -> None:
        self._reached, self._over = Event(), Event()

    def __call__(self) -> None:
        self._reached.set()
        assert self._over.wait(PATIENCE_S)

    def wait_until_reached(self) -> None:
        assert self._reached.wait(PATIENCE_S)

    def end(self) -> None:
        self._over.set()


def nothing() -> None:
    pass


class InterruptedSink(Store):
    """A sink whose run is held up just before or after it writes its manifest, or before it lists what lies there."""

    def __init__(
        self,
        sink: Store,
        *,
        before: Callable[[], None] = nothing,
        after: Callable[[], None] = nothing,
        before_cleaning: Callable[[], None] = nothing,
    ) -> None:
        super().__init__(sink.uri, sink.options)
        self._before, self._after, self._before_cleaning = before, after, before_cleaning
        self._writes = 0

    def write_if(self, name: str, content: bytes, expected: InputObject | None) -> bool:
        if name != MANIFEST_FILE:
            return super().write_if(name, content, expected)
        self._writes += 1
        first = self._writes == 1
        (self._before if first else nothing)()
        written = super().write_if(name, content, expected)
        (self._after if first else nothing)()
        return written

    def objects(self, pattern: str = "") -> list[InputObject]:
        if self._writes == 1:
            once, self._before_cleaning = self._before_cleaning, nothing
            once()
        return super().objects(pattern)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.mark.parametrize("held_up", ["before", "after", "before_cleaning"])
@pytest.mark.parametrize("old", ["an old output", "no output"])
def test_a_run_that_loses_its_claim_while_it_completes_leaves_the_old_output_and_the_other_run_completes(
    sink: Store, first: Writer, second: Writer, tmp_path: Path, threads: ThreadPoolExecutor, held_up: str, old: str
) -> None:
    if old == "an old output":
        first.merge("error")
    pause = Pause()
    others: list[Future[Manifest]] = []

    def claimed_by_second() -> None:
        others.append(threads.submit(second.merge, "overwrite", pause))
        pause.wait_until_reached()

    loser = Writer(tmp_path, "loser", InterruptedSink(sink, **{held_up: claimed_by_second}))
    try:
        with pytest.raises(LostClaimError, match="job second has claimed it"):
            loser.merge("overwrite")
        if old == "an old output":
            assert whose_output(sink) == "first"
        else:
            assert not sink.exists(MANIFEST_FILE)
    finally:
        pause.end()
    assert others[0].result(PATIENCE_S).job_id == "second"
    assert only_output(sink) == "second"


def test_a_run_that_saw_the_manifest_of_a_loser_which_is_taken_back_completes_all_the_same(
    sink: Store, first: Writer, tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    first.merge("error")
    pause = Pause()
    winner = Writer(tmp_path, "winner", InterruptedSink(sink, before=pause))
    others: list[Future[Manifest]] = []

    def about_to_be_completed_by_winner() -> None:
        others.append(threads.submit(winner.merge, "overwrite"))
        pause.wait_until_reached()

    loser = Writer(tmp_path, "loser", InterruptedSink(sink, after=about_to_be_completed_by_winner))
    try:
        with pytest.raises(LostClaimError, match="job winner has claimed it"):
            loser.merge("overwrite")
        assert whose_output(sink) == "first"
    finally:
        pause.end()
    assert others[0].result(PATIENCE_S).job_id == "winner"
    assert only_output(sink) == "winner"
