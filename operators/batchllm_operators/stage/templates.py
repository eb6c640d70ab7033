"""Jinja templates over the columns of a row, in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from jinja2 import StrictUndefined, TemplateSyntaxError, Undefined, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchllm_operators.errors import RowErrorCode, TerminalError
from batchllm_operators.stage.faults import RowFaultError


class _NullColumnError(UndefinedError):
    """A template prints, or computes with, a null."""


class _Null(Undefined):
    """A null column: may be tested and given a default, but not printed, since nobody wants "None" in a prompt."""

    __slots__ = ()
    __str__ = __iter__ = __len__ = Undefined._fail_with_undefined_error

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Null)

    def __hash__(self) -> int:
        return hash(None)


class RowTemplate:
    """One template of the prompt.

    A null column may be tested (`{% if notes %}`) and given a default (`{{ notes or "" }}`); a template that prints
    one makes the row an error.

    Args:
        source: the template's text.
        field_name: where it stands in the job, for messages.

    Raises:
        TerminalError: the text is not a template.
    """

    def __init__(self, source: str, field_name: str) -> None:
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_refuse_none)
        environment.tests["none"] = lambda value: value is None or isinstance(value, _Null)
        try:
            self._template = environment.from_string(source)
            names = meta.find_undeclared_variables(environment.parse(source))
        except TemplateSyntaxError as error:
            raise TerminalError(f"{field_name}: not a valid template: {error.message} (line {error.lineno})") from error
        self.field_name = field_name
        self.columns = frozenset(names - environment.globals.keys())

    def render(self, record: Mapping[str, Any]) -> str:
        """The text for one row.

        Raises:
            RowFaultError: a null column is printed (invalid_row), or the template fails on this row (template_error).
        """
        values = {
            name: _Null(name=name, exc=_NullColumnError) if record[name] is None else record[name]
            for name in self.columns
            if name in record
        }
        try:
            return self._template.render(values)
        except _NullColumnError:
            nulls = sorted(name for name, value in values.items() if isinstance(value, Undefined))
            which = f"column {', '.join(map(repr, nulls))} is null" if nulls else "a value within a column is null"
            raise RowFaultError(
                RowErrorCode.INVALID_ROW, f"{self.field_name}: expected a value to print, but {which}"
            ) from None
        except Exception as error:
            # Expressions of a template can raise anything on the values of a row.
            raise RowFaultError(
                RowErrorCode.TEMPLATE_ERROR, f"{self.field_name}: {type(error).__name__}: {error}"
            ) from error


def _refuse_none(value: object) -> object:
    if value is None:
        _raise_null()
    return value


def _raise_null() -> NoReturn:
    raise _NullColumnError("the template prints a null")
