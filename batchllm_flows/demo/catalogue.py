"""The demo's input: a catalogue of the functions of the Python standard library, built from this interpreter."""

from __future__ import annotations

import importlib
import inspect
import os
import random
import re
import subprocess
import sys
from types import ModuleType

import pyarrow as pa

# How much there is to compute is counted in `demo_job`. `os.path` and `posixpath` are one module: its functions are
# listed twice and make the demo's exact duplicates.
MODULES = (
    "ast", "base64", "fnmatch", "heapq", "json", "os.path", "posixpath", "shlex", "statistics", "textwrap",
)  # fmt: skip
FUNCTIONS_PER_MODULE = 7
DOCSTRING_CHARACTERS = 100
DOCUMENT_CHARACTERS = 800
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")

CATALOGUE_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("module", pa.string(), nullable=False),
        pa.field("document", pa.string(), nullable=False),
        pa.field("function", pa.string(), nullable=False),
        pa.field("signature", pa.string(), nullable=False),
        pa.field("docstring", pa.string()),
    ]
)


def fresh_catalogue() -> pa.Table:
    """`build_catalogue` in a process of its own, so that equal interpreters give equal catalogues.

    Packages that patch the standard library (torch, Prefect) would otherwise change it by having been imported.
    """
    built = subprocess.run(
        [sys.executable, "-P", "-m", "batchllm_flows.demo.catalogue"],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONHASHSEED": "0"},
    )
    with pa.ipc.open_stream(built.stdout) as stream:
        return stream.read_all()


def build_catalogue() -> pa.Table:
    """One row per public function, shuffled: its module's documentation, its signature, its docstring.

    Functions without a docstring are left out but for one, which the job must report as a row without a prompt.
    """
    rows: list[dict[str, str | None]] = []
    untold: dict[str, str | None] | None = None
    for listed_name in MODULES:
        module = importlib.import_module(listed_name)
        functions = public_functions(module)
        document = module_document(module, functions)
        documented = [(name, function) for name, function in functions if inspect.getdoc(function)]
        undocumented = [(name, function) for name, function in functions if not inspect.getdoc(function)]
        for name, function in documented[:FUNCTIONS_PER_MODULE]:
            rows.append(_row(listed_name, module, document, name, function))
        if untold is None and undocumented:
            untold = _row(listed_name, module, document, *undocumented[0])
    if untold is not None:
        rows.append(untold)
    random.Random(2412).shuffle(rows)  # noqa: S311 - an order, not a secret
    return pa.Table.from_pylist(rows, schema=CATALOGUE_SCHEMA)


def public_functions(module: ModuleType) -> list[tuple[str, object]]:
    """The functions that a module offers, by name."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    found = ((name, getattr(module, name, None)) for name in sorted(names))
    return [(name, value) for name, value in found if inspect.isfunction(value) or inspect.isbuiltin(value)]


def module_document(module: ModuleType, functions: list[tuple[str, object]]) -> str:
    """A module's documentation: its docstring, then a line for each of its functions."""
    lines = [inspect.getdoc(module) or "", "", "Functions:"]
    for name, function in functions:
        first = (inspect.getdoc(function) or "").partition("\n")[0]
        lines.append(f"- {name}{signature(function)}: {first}")
    return "\n".join(lines)[:DOCUMENT_CHARACTERS].strip()


def signature(function: object) -> str:
    """The signature as text, without memory addresses; `(...)` for a builtin that does not tell it."""
    if callable(function):
        try:
            return _ADDRESS.sub("", str(inspect.signature(function)))
        except ValueError:
            return "(...)"
    raise TypeError(f"expected a function, got {type(function).__name__}")


def _row(listed_name: str, module: ModuleType, document: str, name: str, function: object) -> dict[str, str | None]:
    docstring = inspect.getdoc(function)
    return {
        "name": f"{listed_name}.{name}",
        "module": module.__name__,
        "document": document,
        "function": name,
        "signature": signature(function),
        "docstring": docstring[:DOCSTRING_CHARACTERS] if docstring else None,
    }


if __name__ == "__main__":
    _catalogue = build_catalogue()
    with pa.ipc.new_stream(sys.stdout.buffer, _catalogue.schema) as _stream:
        _stream.write_table(_catalogue)
