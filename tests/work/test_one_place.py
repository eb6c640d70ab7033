"""Names and schemas of the objects of a work folder stand in `batchllm_operators.work`, and nowhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import batchllm_flows
import batchllm_kernels
import batchllm_operators
import benchmarks.staged
from batchllm_operators.work import layout
from batchllm_operators.work.bundles import BUNDLE_SCHEMA, bundle_name
from batchllm_operators.work.staged import ESTIMATE_FIELD, STAGED_SCHEMA
from batchllm_operators.work.traces import ATTENTION_TRACE_SCHEMA
from tests.generation import RESULT_SCHEMA

WORK = Path(batchllm_operators.__file__).parent / "work"
FOLDERS = [Path(package.__file__ or "").parent for package in (batchllm_flows, batchllm_kernels, batchllm_operators)]
FOLDERS.append(Path(benchmarks.staged.__file__).parent)
MODULES = [path for folder in FOLDERS for path in sorted(folder.rglob("*.py")) if WORK not in path.parents]

NAMES = [value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)]
FILES = [name for name in NAMES if "." in name]
BELOW = [name for name in NAMES if "." not in name]
NAME = re.compile(
    rf"(^|/)({'|'.join(map(re.escape, FILES))})$"
    rf"|(^|/)({'|'.join(map(re.escape, BELOW))})/"
    r"|^/(part|engine)-$|bundle-"
)
"""A name as code spells it, or a piece of one that is put together."""

SCHEMAS = (STAGED_SCHEMA, BUNDLE_SCHEMA, RESULT_SCHEMA, ATTENTION_TRACE_SCHEMA)
COLUMNS = {name for schema in SCHEMAS for name in schema.names} | {ESTIMATE_FIELD.name}
JOINED_BY = {"row_index"}
"""Columns that files on the local disk have too."""


def spelled(source: str) -> Iterator[str]:
    """What a module spells itself: names of objects, and columns as fields of a schema. Prose does not count."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not re.search(r"\s", node.value):
            if NAME.search(node.value):
                yield node.value
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func) == "pa.field":
            column = node.args[0]
            if isinstance(column, ast.Constant) and column.value in COLUMNS - JOINED_BY:
                yield str(column.value)


def test_no_other_module_spells_a_name_or_a_schema_of_the_work_folder() -> None:
    found = {str(path): list(spelled(path.read_text())) for path in MODULES}
    assert len(found) > 100
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('name = f"staged/part-{number:05d}.parquet"', "staged/part-"),
        ('name = f"{STAGED_FOLDER}/part-{number:05d}.parquet"', "/part-"),
        ('work.read_bytes("plan/summary.json")', "plan/summary.json"),
        ('root.newest("*/job.json")', "*/job.json"),
        ('name.startswith("results/")', "results/"),
        ('field = pa.field("prompt_token_ids", kind)', "prompt_token_ids"),
    ],
)
def test_a_name_in_another_module_would_be_seen(source: str, found: str) -> None:
    assert list(spelled(source)) == [found]


def test_every_object_of_the_layout_is_in_its_table() -> None:
    table = layout.__doc__ or ""
    for name in FILES:
        assert f"`{name}`" in table, name
    for name in BELOW:
        assert f"`{name}/" in table or f"/{name}/" in table, name
    folder, _, file = bundle_name(12).rpartition("/")
    assert f"`{folder}/bundle-NNNNN.parquet`" in table
    assert file == "bundle-00012.parquet"
