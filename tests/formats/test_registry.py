"""Formats by name: built in, registered, or brought by an installed package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from pydantic import ValidationError

from batchllm_flows.job import BatchJob
from batchllm_flows.new_job import new_job_file
from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import (
    FileFormat,
    ObjectColumns,
    ReadRows,
    format_named,
    format_names,
    open_source,
    register_format,
    unregister_format,
)
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.specs.source import SourceSpec
from tests.formats import tabbed as toy
from tests.formats.tabbed import TABBED, TabbedReader
from tests.installed_packages import install_entry_point

JOB = """
name: from-outside
source: {uri: in, format: tabbed}
prompt: {kind: template, template: "{{ text }}"}
model: {id: some/model}
sink: {uri: out, format: tabbed}
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages on the path; formats that come from it are forgotten afterwards."""
    place = tmp_path / "packages"
    place.mkdir()
    before = set(format_names())
    monkeypatch.syspath_prepend(str(place))
    yield place
    for name in set(format_names()) - before:
        try:
            unregister_format(name)
        except KeyError:
            continue  # it was never imported


def install(place: Path, package: str, entry: str, module: str | None = None) -> None:
    """Put a package with one entry point there, as an installer does."""
    install_entry_point(place, package, "batchllm_flows.formats", entry)
    if module is not None:
        (place / f"{package}.py").write_text(module)


def test_parquet_and_json_lines_are_built_in() -> None:
    assert format_names()[:5] == ["parquet", "jsonl", "csv", "tsv", "arrow"]
    assert [format_named(name).suffixes[0] for name in ("parquet", "jsonl", "csv")] == [".parquet", ".jsonl", ".csv"]


def test_a_name_that_no_format_has_is_refused_with_those_there_are() -> None:
    expected = (
        r"expected a format among parquet, jsonl, csv, tsv, arrow, got 'avro'; "
        r"others come with packages .* batchllm_flows\.formats"
    )
    with pytest.raises(ValidationError, match=expected):
        SourceSpec(uri="in", format="avro")
    with pytest.raises(ValidationError, match=expected):
        SinkSpec(uri="out", format="avro")
    with pytest.raises(TerminalError, match=expected):
        format_named("avro")


def test_a_format_without_a_writer_is_no_format_of_a_sink_and_the_other_way_round() -> None:
    reading, writing = replace(TABBED, name="reading", writer=None), replace(TABBED, name="writing", reader=None)
    for form in (reading, writing):
        register_format(form)
    try:
        assert SourceSpec(uri="in", format="reading").format == "reading"
        assert SinkSpec(uri="out", format="writing").format == "writing"
        with pytest.raises(ValidationError, match="format 'reading' cannot be written: it has no writer"):
            SinkSpec(uri="out", format="reading")
        with pytest.raises(ValidationError, match="format 'writing' cannot be read: it has no reader"):
            SourceSpec(uri="in", format="writing")
    finally:
        for form in (reading, writing):
            unregister_format(form.name)


@pytest.mark.usefixtures("tabbed")
def test_a_name_is_taken_once() -> None:
    register_format(TABBED)  # the same again does no harm
    with pytest.raises(ValueError, match="format 'tabbed': the name is taken"):
        register_format(replace(TABBED, suffixes=(".tabbed2",)))
    with pytest.raises(ValueError, match="format 'parquet': the name is taken"):
        register_format(replace(TABBED, name="parquet"))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"name": "T S V"}, "format name: expected lower-case letters"),
        ({"suffixes": ()}, "expected at least one suffix"),
        ({"suffixes": ("tabbed",)}, r"expected a suffix such as '\.tsv' or '\.tsv\.gz', got 'tabbed'"),
        ({"suffixes": (".TABBED",)}, "got '.TABBED'"),
        ({"doubtful_suffixes": (".t/v",)}, "got '.t/v'"),
    ],
)
def test_a_format_that_no_name_of_an_object_could_have_is_refused(wrong: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        replace(TABBED, **wrong)  # type: ignore[arg-type]


def test_what_is_no_format_is_not_registered() -> None:
    with pytest.raises(TypeError, match="expected a FileFormat, got TabbedReader"):
        register_format(TabbedReader())  # type: ignore[arg-type]


def test_a_reader_that_forgets_a_column_is_told_so(tmp_path: Path) -> None:
    class Forgetful(TabbedReader):
        def read(self, *_: object, **__: object) -> Iterator[ReadRows]:
            yield ReadRows(pa.RecordBatch.from_pydict({"other": ["x"]}))

        def columns_of(self, *_: object) -> ObjectColumns:
            return ObjectColumns(pa.schema([("text", pa.string())]))

    (tmp_path / "a.tabbed").write_bytes(b"")
    register_format(FileFormat("forgetful", (".tabbed",), "an object", reader=Forgetful()))
    try:
        source = open_source(SourceSpec(uri=str(tmp_path), format="forgetful"))
        with pytest.raises(TerminalError, match="format 'forgetful' told columns that it does not give: text"):
            list(source.batches(["text"]))
    finally:
        unregister_format("forgetful")


def test_an_installed_package_brings_its_format_to_every_process(tmp_path: Path) -> None:
    install(tmp_path, "toy_tabbed", "tabbed = toy_tabbed:TABBED", Path(toy.__file__).read_text())
    (tmp_path / "job.yaml").write_text(JOB)
    program = (
        "import sys\n"
        "from batchllm_operators.formats import format_named, format_names\n"
        "print(format_names(), 'toy_tabbed' in sys.modules)\n"
        "from batchllm_flows.job import BatchJob\n"
        f"job = BatchJob.from_file({str(tmp_path / 'job.yaml')!r})\n"
        "print(job.sink.layout.format, format_named('tabbed').suffixes)\n"
        "print(BatchJob.model_json_schema()['$defs']['SinkSpec']['properties']['format']['enum'])\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    printed = subprocess.run(
        [sys.executable, "-c", program],
        check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    ).stdout.splitlines()  # fmt: skip
    assert printed == [
        "['parquet', 'jsonl', 'csv', 'tsv', 'arrow', 'tabbed'] False",
        "tabbed ('.tabbed', '.tbd')",
        "['parquet', 'jsonl', 'csv', 'tsv', 'arrow', 'tabbed']",
    ]


def test_a_package_that_cannot_be_imported_harms_only_the_jobs_that_name_its_format(installed: Path) -> None:
    install(installed, "broken_tabbed", "broken = broken_tabbed:TABBED", "raise RuntimeError('no licence')")
    assert SourceSpec(uri="in", format="parquet").format == "parquet"
    expected = r"entry point broken_tabbed:TABBED of broken_tabbed cannot be imported: RuntimeError: no licence"
    with pytest.raises(ValidationError, match=expected):
        SourceSpec(uri="in", format="broken")


def test_two_packages_with_one_name_are_refused_with_both(installed: Path) -> None:
    for package in ("one_tabbed", "other_tabbed"):
        install(installed, package, f"twice = {package}:TABBED", "TABBED = None")
    expected = (
        "more than one package brings it: entry point one_tabbed:TABBED of one_tabbed, entry point other_tabbed:TABBED"
    )
    with pytest.raises(ValidationError, match=expected):
        SourceSpec(uri="in", format="twice")


def test_an_entry_point_must_name_a_format(installed: Path) -> None:
    install(installed, "text_tabbed", "text = text_tabbed:TABBED", "TABBED = 'a text'")
    with pytest.raises(ValidationError, match="expected a FileFormat, got str"):
        SourceSpec(uri="in", format="text")


def test_an_entry_point_must_have_the_name_of_its_format(installed: Path) -> None:
    install(installed, "renamed_tabbed", "renamed = renamed_tabbed:TABBED", "from tests.formats.tabbed import TABBED")
    with pytest.raises(ValidationError, match="is named 'tabbed': expected the name of its entry point"):
        SourceSpec(uri="in", format="renamed")


def test_an_entry_point_cannot_take_a_name_that_is_built_in(installed: Path) -> None:
    install(installed, "false_parquet", "parquet = false_parquet:TABBED", "raise RuntimeError")
    assert format_named("parquet").content == "a Parquet object"


def test_a_form_shows_the_formats_as_a_choice() -> None:
    schema = BatchJob.model_json_schema()["$defs"]
    for part in ("SourceSpec", "SinkSpec"):
        assert schema[part]["properties"]["format"]["enum"] == ["parquet", "jsonl", "csv", "tsv", "arrow"]
        assert schema[part]["properties"]["format"]["type"] == "string"


@pytest.mark.usefixtures("tabbed")
@pytest.mark.parametrize("uri", ["rows", "rows/a.tbd"])
def test_init_writes_a_job_for_input_of_any_format(tmp_path: Path, uri: str) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.tbd").write_bytes(b"id\ttext\n1\tone\n")
    job = yaml.safe_load(new_job_file(str(tmp_path / uri)))
    assert (job["source"]["format"], job["source"]["id_column"], job["sink"]["format"]) == ("tabbed", "id", "tabbed")


def test_init_passes_over_a_format_that_cannot_be_imported_or_read(tmp_path: Path, installed: Path) -> None:
    install(installed, "broken_tabbed", "broken = broken_tabbed:TABBED", "raise RuntimeError('no licence')")
    register_format(replace(TABBED, name="writing", reader=None))
    try:
        with pytest.raises(TerminalError, match=r"no object matches \(expected names that end in \.parquet"):
            new_job_file(str(tmp_path / "nothing"))
    finally:
        unregister_format("writing")
