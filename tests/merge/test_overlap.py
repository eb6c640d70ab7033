"""Places where the next run would take answers for input, or input would look like output."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import open_source
from batchllm_operators.merge.sink import refuse_overlap
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store

BELOW = "a folder below it holds input of this job"
SAME = "the folder holds input of this job"
TAKEN = r"sink\.uri: what is written there would be input of the next run"

# Source URI, sink, and what is said; input lies at in/a.parquet and in/deep/b.parquet.
PLACES = [
    ("in", "out", None),
    ("in", "in", SAME),
    ("in", "in/answers", TAKEN),
    ("in/", "in/answers/", TAKEN),
    ("in", "in/deep/answers", TAKEN),
    ("in", "in/deep", SAME),
    ("in", "in/_answers", None),
    ("in", "input", None),
    ("in", ".", BELOW),
    ("in/*.parquet", "in", SAME),
    ("in/*.parquet", "in/answers", None),
    ("in/**", "in/answers", TAKEN),
    ("in/**/*.parquet", "in/answers", TAKEN),
    ("in/*/*.parquet", "in/answers", TAKEN),
    ("in/d*/*.parquet", "in/answers", None),
    ("in/a.parquet", "in/answers", None),
    ("in/a.parquet", "in", SAME),
    ("in/deep/b.parquet", "in", BELOW),
]


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    uri = str(tmp_path) if request.param == "disk" else f"{request.getfixturevalue('bucket')}/root"
    for name in ("in/a.parquet", "in/deep/b.parquet"):
        Store(uri).write_table(name, pa.table({"text": ["x"]}))
    return uri


def check(source: str, sink: str, work: str) -> None:
    refuse_overlap(open_source(SourceSpec(uri=source, format="parquet")), Store(sink), Store(work))


def test_a_sink_where_the_source_looks_for_input_is_refused(root: str) -> None:
    for source, sink, expected in PLACES:
        uri = root if sink == "." else f"{root}/{sink}"
        if expected is None:
            check(f"{root}/{source}", uri, f"{root}/work")
        else:
            with pytest.raises(TerminalError, match=expected):
                check(f"{root}/{source}", uri, f"{root}/work")


def test_a_place_for_work_where_the_source_looks_for_input_is_refused(root: str) -> None:
    with pytest.raises(TerminalError, match=r"execution\.work_uri: what is written there would be input"):
        check(f"{root}/in", f"{root}/out", f"{root}/in/work/0123")
    check(f"{root}/in", f"{root}/out", f"{root}/in/_work/0123")


def test_a_work_folder_of_another_job_may_be_input(root: str) -> None:
    Store(root).write_table("out/_batchllm/0123/results/part-1.parquet", pa.table({"text": ["x"]}))
    check(f"{root}/out/_batchllm/0123/results", f"{root}/out", f"{root}/out/_batchllm/4567")


def test_symbolic_links_do_not_hide_that_two_folders_are_one(tmp_path: Path) -> None:
    Store(str(tmp_path / "in")).write_table("a.parquet", pa.table({"text": ["x"]}))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(TerminalError, match=TAKEN):
        check(str(tmp_path / "in"), str(tmp_path / "link" / "answers"), str(tmp_path / "work"))
    with pytest.raises(TerminalError, match=SAME):
        check(str(tmp_path / "link"), str(tmp_path / "in"), str(tmp_path / "work"))


def test_kept_answers_where_the_source_looks_for_input_are_refused(root: str) -> None:
    source = open_source(SourceSpec(uri=f"{root}/in", format="parquet"))
    refuse_overlap(source, Store(f"{root}/out"), Store(f"{root}/work"), Store(f"{root}/kept"))
    with pytest.raises(TerminalError, match=r"execution\.reuse: what is written there would be input of the next run"):
        refuse_overlap(source, Store(f"{root}/out"), Store(f"{root}/work"), Store(f"{root}/in/kept"))
