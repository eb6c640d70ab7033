"""What a job names and a package from outside may add to: by a call, or by an entry point of its distribution.

A job is read in several processes (the command line, a Prefect worker, a server that shows the form of a deployment).
A call reaches one process; an entry point reaches every process of an environment in which the package is installed:

    [project.entry-points."batchllm_flows.formats"]
    tsv = "my_package.formats:TSV"

An entry point is imported when a job names it, and not before: a broken package harms no job that does not use it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import AfterValidator, GetJsonSchemaHandler
from pydantic_core import CoreSchema


class Registry:
    """Objects of one kind by name. Names that are built in come first and cannot be taken by others.

    Args:
        kind: what they are, for messages, e.g. `format`.
        group: group of the entry points.
        contract: `module:Class` that each of them is an instance of; its `name` is the name it is registered under.
        built_in: name -> `module:attribute`, in the order in which names are shown; imported when they are used.
    """

    def __init__(self, kind: str, group: str, contract: str, built_in: Mapping[str, str]) -> None:
        self.group = group
        self._kind = kind
        self._contract = contract
        self._built_in = dict(built_in)
        self._registered: dict[str, Any] = {}

    def names(self) -> list[str]:
        """All names that a job may use here; imports none of what they stand for."""
        return list(dict.fromkeys([*self._built_in, *self._registered, *sorted(self._entry_points())]))

    def register(self, added: Any) -> None:
        """Add an object under its name, in this process; the same object twice is no error.

        Raises:
            TypeError: it is not what the contract asks for.
            ValueError: the name is taken.
        """
        self._require_contract(added, "register")
        name = added.name
        if name in self._built_in or self._registered.get(name, added) is not added:
            raise ValueError(f"{self._kind} {name!r}: the name is taken")
        self._registered[name] = added

    def remove(self, name: str) -> None:
        """Take back what `register` added, for example at the end of a test.

        Raises:
            KeyError: `register` added nothing of this name.
        """
        del self._registered[name]

    def get(self, name: str) -> Any:
        """The object of a name: built in, else registered by a call, else of an entry point.

        Raises:
            ValueError: no such name (lists those there are), more than one package brings it, or what the entry point
                names cannot be imported or is something else.
        """
        if name in self._built_in:
            return _imported(self._built_in[name])
        if name in self._registered:
            return self._registered[name]
        points = self._entry_points().get(name, [])
        if not points:
            expected = f"{_article(self._kind)} {self._kind}"
            raise ValueError(
                f"expected {expected} among {', '.join(self.names())}, got {name!r}; others come "
                f"with packages that have entry points in the group {self.group}"
            )
        if len(points) > 1:
            raise ValueError(
                f"{self._kind} {name!r}: more than one package brings it: {', '.join(sorted(map(_told, points)))}"
            )
        return self._loaded(points[0])

    def in_use(self) -> list[Any]:
        """The objects that are built in, and those that were registered or imported in this process."""
        return [*map(_imported, self._built_in.values()), *self._registered.values()]

    def _loaded(self, point: EntryPoint) -> Any:
        where = f"{self._kind} {point.name!r}: {_told(point)}"
        try:
            found = point.load()
        except Exception as error:
            # A package from outside may raise anything while it is imported, and all of it is a fault of the name.
            raise ValueError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
        try:
            self._require_contract(found, where)
        except TypeError as error:
            raise ValueError(str(error)) from error
        if found.name != point.name:
            raise ValueError(f"{where} is named {found.name!r}: expected the name of its entry point")
        self._registered[found.name] = found
        return found

    def _require_contract(self, found: Any, where: str) -> None:
        contract = _imported(self._contract)
        if not isinstance(found, contract):
            raise TypeError(f"{where}: expected a {contract.__name__}, got {type(found).__name__}")

    def _entry_points(self) -> dict[str, list[EntryPoint]]:
        return _entry_points(self.group, tuple(sys.path))


@dataclass(frozen=True)
class NamesInSchema:
    """Lists the names of a registry in the JSON Schema of a job: a form shows them as a choice."""

    registry: Registry

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": self.registry.names()}


def known_name(registry: Registry) -> tuple[AfterValidator, NamesInSchema]:
    """The annotations of a field of a job that names something of a registry, which is not imported for that."""

    def known(name: str) -> str:
        if name not in registry.names():
            registry.get(name)  # says which names there are
        return name

    return AfterValidator(known), NamesInSchema(registry)


@lru_cache(maxsize=8)
def _entry_points(group: str, _path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """The entry points of a group by name; looked up anew when the places of packages change (40 ms each time)."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _imported(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)


def _told(point: EntryPoint) -> str:
    package = f" of {point.dist.name}" if point.dist is not None else ""
    return f"entry point {point.value}{package}"
