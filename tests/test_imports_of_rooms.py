"""Imports go down through the rooms of the house, and a package from outside is known to the rooms that may know it.

The rules are about what the source says, so an import inside a function or for type checking counts as any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("batchllm_flows", "operators/batchllm_operators", "kernels/batchllm_kernels")

FLOORS = (
    ("batchllm_flows",),
    ("stage", "plan", "execute", "merge", "answers"),
    ("work", "formats"),
    ("cost",),
    ("tasks",),
    ("models",),
    ("machine",),
    ("specs",),
    ("columns",),
    ("store",),
    ("ground",),
)
"""The rooms from top to bottom. A room imports rooms of lower floors only: none of its own floor, none above."""

SINGLE_MODULES = {
    "cost": ("cost",),
    "store": (
        *("store", "object_store", "store_entries", "store_errors", "conditional_write", "parquet_objects"),
        *("filesystems", "disk_space", "storage_retries", "unfinished_removal", "unfinished_writes"),
    ),
    "ground": (
        *("backend_names", "batch_sizes", "digests", "errors", "format_names", "keys", "process_identity", "records"),
        *("registry", "retry", "row_errors", "schemes", "spec_base", "svg", "task_names", "temporary_folders"),
        *("terminal", "wording"),
    ),
}
"""Rooms that are modules directly in `batchllm_operators`; every other room is a folder there of the same name."""

KERNEL_ROOMS = {
    "kernels.arrays": (),
    "kernels.attention": ("kernels.arrays",),
    "kernels.vllm_plugin": ("kernels.arrays", "kernels.attention"),
    "kernels.bench": ("kernels.arrays", "kernels.attention", "kernels.vllm_plugin"),
}
"""Rooms of `batchllm_kernels`, each with what it imports; none of them imports a room of `FLOORS`."""

MAY_USE_KERNELS = {"execute": ("kernels.vllm_plugin",), "plan": ("kernels.attention",)}
"""Rooms of `FLOORS` that import kernels: an engine process runs in `execute`, and a plan asks the cost gate."""

MAY_KNOW = {
    "fsspec": ("store",),
    "s3fs": ("store",),
    "botocore": ("store",),
    "numba": ("columns",),
    "vllm": ("execute.vllm_engine", "tasks", "kernels.vllm_plugin"),
    "triton": ("kernels.attention",),
}
"""Packages from outside, each with the rooms, or modules as `room.module`, that may import it."""

EXCEPTIONS = {
    (
        "formats.input_objects",
        "fsspec",
    ): "matches the names of objects against the pattern of a source as the store does",
    ("kernels.bench.timers", "triton"): "measures copies and products with Triton's timer",
    ("kernels.bench.stages", "triton"): "passes over a tile that Triton finds too large for the device",
    ("kernels.bench.stock_attention", "vllm"): "measures vLLM's own attention where vLLM is installed",
    ("kernels.bench.__main__", "triton"): "writes Triton's version beside the figures",
}
"""What breaks a rule today, (importing module, what it imports), and why."""


def modules() -> dict[str, Path]:
    """All modules of the packages, by dotted name."""
    found = {}
    for package in PACKAGES:
        folder = ROOT / package
        for file in folder.rglob("*.py"):
            name = ".".join(file.relative_to(folder.parent).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


def imported(tree: ast.AST) -> Iterable[str]:
    """Dotted names that a module imports: modules, or names in modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "expected absolute imports"
            yield from (f"{node.module}.{one.name}" for one in node.names)


def in_house(module: str) -> str:
    """The name of a module by its room: `execute.fleet`, `kernels.attention.api`, `store.filesystems`."""
    package, _, rest = module.partition(".")
    if package == "batchllm_flows":
        return module
    if package == "batchllm_kernels":
        return f"kernels.{rest}" if rest else "kernels"
    first = rest.partition(".")[0]
    room = next((room for room, names in SINGLE_MODULES.items() if first in names), None)
    return f"{room}.{rest}" if room and room != rest else rest


def room_of(name: str) -> str:
    """The room of a module that `in_house` has named."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "kernels" else parts[0]


def rooms_allowed_to(room: str) -> set[str]:
    """The rooms that a room may import."""
    if room in KERNEL_ROOMS:
        return {room, *KERNEL_ROOMS[room]}
    floor = next(number for number, rooms in enumerate(FLOORS) if room in rooms)
    below = {other for rooms in FLOORS[floor + 1 :] for other in rooms}
    return {room, *below, *MAY_USE_KERNELS.get(room, ())}


def breaches(imports: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Imports that break a rule.

    Args:
        imports: by importing module as `in_house` names it, the modules and the outside packages that it imports.
    """
    found = set()
    for importer, names in imports.items():
        for name in names:
            if name in MAY_KNOW:
                allowed = any(importer == one or importer.startswith(f"{one}.") for one in MAY_KNOW[name])
            else:
                allowed = room_of(name) in rooms_allowed_to(room_of(importer))
            if not allowed:
                found.add((importer, name))
    return found


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    files = modules()
    found: dict[str, set[str]] = {}
    for module, file in files.items():
        names = found.setdefault(in_house(module), set())
        for name in imported(ast.parse(file.read_text(encoding="utf-8"))):
            own = next((one for one in (name, name.rpartition(".")[0]) if one in files), None)
            if own is not None:
                names.add(in_house(own))
            elif (package := name.partition(".")[0]) in MAY_KNOW:
                names.add(package)
    return found


def test_every_module_belongs_to_a_room() -> None:
    rooms = {room for floor in FLOORS for room in floor} | set(KERNEL_ROOMS)
    packages = {"batchllm_operators", "batchllm_kernels"}
    homeless = [one for one in modules() if one not in packages and room_of(in_house(one)) not in rooms]
    assert homeless == []


def test_imports_go_down_but_for_the_exceptions_that_are_named(imports: dict[str, set[str]]) -> None:
    assert breaches(imports) - set(EXCEPTIONS) == set()


def test_no_exception_is_named_that_is_not_needed(imports: dict[str, set[str]]) -> None:
    assert set(EXCEPTIONS) - breaches(imports) == set()


@pytest.mark.parametrize(
    ("importer", "name"),
    [
        ("store", "plan.order"),
        ("plan.order", "stage.staging"),
        ("plan.order", "batchllm_flows.job"),
        ("plan.order", "kernels.vllm_plugin.options"),
        ("kernels.attention.api", "kernels.vllm_plugin.options"),
        ("kernels.attention.api", "ground.errors"),
        ("execute.fleet", "kernels.attention.api"),
        ("execute.fleet", "vllm"),
        ("plan.order", "fsspec"),
        ("kernels.vllm_plugin.scheduler", "triton"),
    ],
)
def test_an_import_that_breaks_a_rule_is_seen(importer: str, name: str) -> None:
    assert breaches({importer: {name}}) == {(importer, name)}


@pytest.mark.parametrize(
    ("importer", "name"),
    [
        ("batchllm_flows.flows", "plan.order"),
        ("execute.worker", "kernels.vllm_plugin.options"),
        ("execute.vllm_engine", "vllm"),
        ("store.filesystems", "fsspec"),
        ("kernels.bench.measure", "kernels.attention.api"),
    ],
)
def test_an_import_that_keeps_the_rules_is_none_of_these(importer: str, name: str) -> None:
    assert breaches({importer: {name}}) == set()
