"""Conditions over columns in SQL, such as `status = 'open' AND created >= '2026-11-01'`, as Arrow expressions.

The text is parsed by sqlglot. What is understood: `=`, `<>`, `<`, `<=`, `>`, `>=`, `AND`, `OR`, `NOT`, `IN (...)`,
`BETWEEN`, `IS [NOT] NULL | TRUE | FALSE`, `LIKE`, `ILIKE`, `+`, `-`, `*`, `lower`, `upper`, `trim`, `length`,
`coalesce`, `CAST`, `DATE '...'`, `TIMESTAMP '...'`, fields of structs (`order.total`) and names in double quotes. As in
SQL, a condition that is null for a row is not true for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import reduce
from operator import and_, or_
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from sqlglot import exp

_EXAMPLE = "\"status = 'open' AND created >= '2026-11-01'\""
_ROW = "\0row"
"""A column of row numbers beside those of the input; no name in SQL can be this one."""
_CASTS = {
    "BIGINT": pa.int64(), "INT": pa.int64(), "SMALLINT": pa.int64(), "TINYINT": pa.int64(), "DOUBLE": pa.float64(),
    "FLOAT": pa.float64(), "VARCHAR": pa.string(), "TEXT": pa.string(), "BOOLEAN": pa.bool_(), "DATE": pa.date32(),
    "TIMESTAMP": pa.timestamp("us"),
}  # fmt: skip


class SqlFilterError(ValueError):
    """A condition that is no SQL, that says what is not understood here, or that does not go with its columns."""


class SqlFilter:
    """One condition.

    Args:
        text: in SQL.

    Raises:
        SqlFilterError: it does not parse, or has parts that are not understood.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._condition = _parsed(text)
        self.columns = frozenset(_column_path(one)[0] for one in self._condition.find_all(_expressions().Column))
        """Names of the columns that it looks at."""
        if not self.columns:
            raise SqlFilterError(f"expected a condition over columns, got {text!r}")
        # Types are looked at where there are columns; what is not understood is told here.
        try:
            _Translation(None).condition(self._condition)
        except RecursionError as error:
            raise SqlFilterError("the condition is nested too deeply") from error

    def parts(self) -> list[SqlFilter]:
        """The conditions that all have to hold, where this one is several joined by AND; else this one."""
        return [SqlFilter(one.sql()) for one in self._condition.flatten()] if self._is_and() else [self]

    def _is_and(self) -> bool:
        return isinstance(self._condition, _expressions().And)

    def expression(self, schema: pa.Schema) -> pc.Expression:
        """The condition over columns of these types.

        Raises:
            SqlFilterError: it does not go with them.
        """
        try:
            expression = _Translation(schema).condition(self._condition)
            _held_against(expression, schema.empty_table())
        except (pa.ArrowException, pa.ArrowKeyError) as error:
            types = ", ".join(f"{name} is {schema.field(name).type}" for name in sorted(self.columns))
            raise SqlFilterError(f"{str(error).splitlines()[0]} ({types})") from error
        return expression

    def holds(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """For which rows of a table it is true.

        Args:
            table: with the columns of the condition; others may be there too.

        Returns:
            A bool for each row.

        Raises:
            SqlFilterError: it does not go with the columns, or a value does not convert as it asks.
        """
        own = table.select(sorted(self.columns))
        try:
            rows = _held_against(self.expression(own.schema), own)
        except pa.ArrowException as error:
            raise SqlFilterError(str(error).splitlines()[0]) from error
        found = np.zeros(len(table), np.bool_)
        found[rows] = True
        return found


def _held_against(expression: pc.Expression, table: pa.Table) -> npt.NDArray[np.int64]:
    numbered = table.append_column(_ROW, pa.array(np.arange(len(table))))
    rows: npt.NDArray[np.int64] = numbered.filter(expression)[_ROW].to_numpy()
    return rows


def _expressions() -> Any:
    """The classes of sqlglot's syntax trees; loaded where there is a filter, since that takes 0.1 s."""
    from sqlglot import exp

    return exp


def _parsed(text: str) -> exp.Expression:
    from sqlglot import parse_one
    from sqlglot.errors import SqlglotError

    try:
        condition = parse_one(text, into=_expressions().Condition)
    except (SqlglotError, RecursionError) as error:
        raise SqlFilterError(f"expected an SQL condition, such as {_EXAMPLE}, got {text!r}") from error
    unnested: exp.Expression = condition.unnest()
    return unnested


def _column_path(column: Any) -> list[str]:
    """Name of a column, and of the fields within it."""
    return [part.name for part in column.parts]


@dataclass(frozen=True)
class _Value:
    """A part of a condition.

    Attributes:
        expression: it.
        kind: its type; None where only Arrow knows.
        literal: its value, where it is a number or a text of the condition.
    """

    expression: pc.Expression
    kind: pa.DataType | None = None
    literal: str | int | Decimal | None = None


class _Translation:
    """Makes Arrow expressions of syntax trees.

    Args:
        schema: of the columns; None: not known yet.
    """

    def __init__(self, schema: pa.Schema | None) -> None:
        self._schema = schema
        exp = _expressions()
        self._conditions: Mapping[type, Callable[[Any], pc.Expression]] = {
            exp.And: lambda node: reduce(and_, map(self.condition, node.flatten())),
            exp.Or: lambda node: reduce(or_, map(self.condition, node.flatten())),
            exp.Not: lambda node: ~self.condition(node.this),
            exp.Paren: lambda node: self.condition(node.this),
            exp.EQ: lambda node: self._compared(node, lambda left, right: left == right),
            exp.NEQ: lambda node: self._compared(node, lambda left, right: left != right),
            exp.LT: lambda node: self._compared(node, lambda left, right: left < right),
            exp.LTE: lambda node: self._compared(node, lambda left, right: left <= right),
            exp.GT: lambda node: self._compared(node, lambda left, right: left > right),
            exp.GTE: lambda node: self._compared(node, lambda left, right: left >= right),
            exp.Between: self._between,
            exp.In: self._in,
            exp.Is: self._is,
            exp.Like: lambda node: self._like(node, ignore_case=False),
            exp.ILike: lambda node: self._like(node, ignore_case=True),
            exp.Boolean: lambda node: pc.scalar(bool(node.this)),
            exp.Column: lambda node: self._column(node).expression,
        }
        self._values: Mapping[type, Callable[[Any], _Value]] = {
            exp.Column: self._column,
            exp.Literal: _literal,
            exp.Paren: lambda node: self._value(node.this),
            exp.Boolean: lambda node: _Value(pc.scalar(bool(node.this)), pa.bool_()),
            exp.Neg: self._negative,
            exp.Add: lambda node: self._computed(node, pc.add_checked),
            exp.Sub: lambda node: self._computed(node, pc.subtract_checked),
            exp.Mul: lambda node: self._computed(node, pc.multiply_checked),
            exp.Lower: lambda node: self._of_text(node, pc.utf8_lower),
            exp.Upper: lambda node: self._of_text(node, pc.utf8_upper),
            exp.Trim: lambda node: self._of_text(node, pc.utf8_trim_whitespace),
            exp.Length: lambda node: _Value(pc.utf8_length(self._text(node.this))),
            exp.Coalesce: self._coalesced,
            exp.Cast: self._cast,
        }

    def condition(self, node: exp.Expression) -> pc.Expression:
        """The expression of what is true or false."""
        if type(node) not in self._conditions:
            raise _not_understood(node)
        return self._conditions[type(node)](node)

    def _value(self, node: exp.Expression) -> _Value:
        if type(node) in self._values:
            return self._values[type(node)](node)
        return _Value(self.condition(node), pa.bool_())

    def _column(self, node: exp.Expression) -> _Value:
        path = _column_path(node)
        if self._schema is None:
            return _Value(pc.field(*path))
        kind = self._schema.field(path[0]).type
        for name in path[1:]:
            if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
                raise SqlFilterError(f"no field {name!r} in {node.sql()!r}: the column is {kind}")
            kind = kind.field(name).type
        return _Value(pc.field(*path), kind)

    def _compared(self, node: Any, compare: Callable[[pc.Expression, pc.Expression], pc.Expression]) -> pc.Expression:
        left, right = _of_one_type(self._value(node.this), self._value(node.expression), node)
        return compare(left.expression, right.expression)

    def _between(self, node: Any) -> pc.Expression:
        value = self._value(node.this)
        low_of, low = _of_one_type(value, self._value(node.args["low"]), node)
        high_of, high = _of_one_type(value, self._value(node.args["high"]), node)
        return (low_of.expression >= low.expression) & (high_of.expression <= high.expression)

    def _in(self, node: Any) -> pc.Expression:
        if not node.expressions or node.args.get("query") is not None:
            raise _not_understood(node)
        value = self._value(node.this)
        pairs = [_of_one_type(value, self._value(one), node) for one in node.expressions]
        return reduce(or_, [left.expression == right.expression for left, right in pairs])

    def _is(self, node: Any) -> pc.Expression:
        exp = _expressions()
        value = self._value(node.this).expression
        if isinstance(node.expression, exp.Null):
            return value.is_null()
        if isinstance(node.expression, exp.Boolean):
            return pc.coalesce(value == bool(node.expression.this), pc.scalar(False))
        raise _not_understood(node)

    def _like(self, node: Any, *, ignore_case: bool) -> pc.Expression:
        pattern = self._value(node.expression).literal
        if not isinstance(pattern, str):
            raise _not_understood(node)
        return pc.match_like(self._text(node.this), pattern, ignore_case=ignore_case)

    def _text(self, node: exp.Expression) -> pc.Expression:
        value = self._value(node)
        return _typed(value, pa.string()).expression if value.kind is not None else value.expression

    def _of_text(self, node: Any, function: Callable[[pc.Expression], pc.Expression]) -> _Value:
        if set(node.args) - {"this"} and any(node.args[name] for name in set(node.args) - {"this"}):
            raise _not_understood(node)
        return _Value(function(self._text(node.this)), pa.string())

    def _negative(self, node: Any) -> _Value:
        value = self._value(node.this)
        if isinstance(value.literal, int | Decimal):
            return _number(-value.literal)
        return _Value(pc.negate_checked(value.expression), value.kind)

    def _computed(self, node: Any, function: Callable[[Any, Any], pc.Expression]) -> _Value:
        left, right = _of_one_type(self._value(node.this), self._value(node.expression), node)
        return _Value(function(left.expression, right.expression))

    def _coalesced(self, node: Any) -> _Value:
        values = [self._value(node.this), *map(self._value, node.expressions)]
        kind = next((one.kind for one in values if one.kind is not None and not pa.types.is_null(one.kind)), None)
        alike = values if kind is None else [_typed(one, kind) for one in values]
        return _Value(pc.coalesce(*(one.expression for one in alike)), kind)

    def _cast(self, node: Any) -> _Value:
        kind = _CASTS.get(node.to.sql().upper())
        if kind is None:
            raise SqlFilterError(f"expected a type among {', '.join(_CASTS)}, got {node.to.sql()!r} in {node.sql()!r}")
        value = self._value(node.this)
        if isinstance(value.literal, str):
            return _typed(value, kind)
        return _Value(value.expression.cast(kind), kind)


def _not_understood(node: exp.Expression) -> SqlFilterError:
    return SqlFilterError(
        f"{node.sql()!r} is not understood here: expected comparisons, AND, OR, NOT, IN (...), BETWEEN, IS NULL, LIKE"
    )


def _literal(node: Any) -> _Value:
    if node.is_string:
        return _Value(pc.scalar(node.this), pa.string(), node.this)
    return _number(int(node.this) if node.is_int else Decimal(node.this))


def _number(value: int | Decimal) -> _Value:
    try:
        scalar = pa.scalar(value if isinstance(value, int) else float(value))
    except (OverflowError, pa.ArrowException) as error:
        raise SqlFilterError(f"the number {value} has more than 64 bits") from error
    return _Value(pc.scalar(scalar), scalar.type, value)


def _of_one_type(left: _Value, right: _Value, node: exp.Expression) -> tuple[_Value, _Value]:
    """Two values that are compared: a literal, and a column of nulls, takes the type of the other one.

    Raises:
        SqlFilterError: they are of kinds that cannot be compared; names the part of the condition.
    """
    if _adapts_to(left, right.kind):
        left = _typed(left, right.kind)
    elif _adapts_to(right, left.kind):
        right = _typed(right, left.kind)
    if left.kind is not None and right.kind is not None and _family(left.kind) != _family(right.kind):
        raise SqlFilterError(f"{node.sql()!r} compares {left.kind} with {right.kind}")
    return left, right


def _family(kind: pa.DataType) -> str:
    """What values of a type can be compared with."""
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return "text" if any(test(kind) for test in texts) else "time" if pa.types.is_temporal(kind) else str(kind)


def _adapts_to(value: _Value, kind: pa.DataType | None) -> bool:
    if kind is None or value.kind is None or kind.equals(value.kind):
        return False
    if pa.types.is_null(value.kind):
        return True
    if isinstance(value.literal, str) and _family(kind) == "number":
        return True
    if isinstance(value.literal, str) or pa.types.is_date(value.kind) or pa.types.is_timestamp(value.kind):
        return _family(kind) == "time"
    return value.literal is not None and bool(pa.types.is_decimal(kind))


def _typed(value: _Value, kind: pa.DataType) -> _Value:
    """A value as one of another type, where it is a literal or null; any other stays as it is."""
    if isinstance(value.literal, str) and not pa.types.is_string(kind):
        return _Value(pc.scalar(_of_text(value.literal, kind)), kind)
    if isinstance(value.literal, int | Decimal) and pa.types.is_decimal(kind):
        return _Value(pc.scalar(pa.scalar(Decimal(value.literal))), kind)
    if value.kind is not None and (pa.types.is_null(value.kind) or pa.types.is_temporal(kind)):
        return _Value(value.expression.cast(kind), kind)
    return value


def _of_text(text: str, kind: pa.DataType) -> pa.Scalar:
    """A text as a value of a type; a time without a zone is of UTC."""
    zoned = pa.types.is_timestamp(kind) and kind.tz is not None
    try:
        return pa.scalar(text).cast(kind)
    except pa.ArrowInvalid as error:
        if zoned:
            try:
                return pc.assume_timezone(pa.scalar(text).cast(pa.timestamp(kind.unit)), "UTC").cast(kind)
            except pa.ArrowInvalid:
                pass
        raise SqlFilterError(f"expected a value of type {kind}, got {text!r}") from error
