"""The sandbox in which the templates of a job run: what a name, a field and a printed value mean there.

Jinja looks for attributes before fields, so that `{{ order.items }}` is a method of Python's dict where the struct has
a field of that name, and prints whatever it finds. Here a field of a struct always wins, a method exists only where it
is called, and nothing but data is printed.
"""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import StrictUndefined, Undefined
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import generate_lorem_ipsum, pass_environment

from batchllm_operators.stage.template_limits import RenderLimits
from batchllm_operators.stage.value_text import Null, decoded, json_text, json_value, value_text

_FILTERS_OF_TEXT = (
    "capitalize", "center", "e", "escape", "forceescape", "indent", "lower", "replace", "safe", "string", "striptags",
    "title", "trim", "truncate", "upper", "urlize", "wordcount", "wordwrap",
)  # fmt: skip
_FILTERS_OF_DATA = ("urlencode", "xmlattr")
_FILTERS_THAT_WRITE_DATA = frozenset({*_FILTERS_OF_TEXT, "string", "join", "tojson", "pprint"})
_FILTERS_WITH_WIDTHS = frozenset({"center", "indent", "wordwrap", "batch", "slice"})
_CHARACTERS_OF_A_WORD = 1_000  # far more than one has, because each takes ten microseconds
_SHOWN_FIELDS = 10


class Missing(StrictUndefined):
    """A name, field or method that is not there: an error wherever it is used, but for `is defined` and `default`."""

    __slots__ = ()
    __repr__ = StrictUndefined._fail_with_undefined_error


class Fields(dict[str, Any]):
    """A struct or a map; its text is JSON."""

    def __str__(self) -> str:
        return json_text(self)

    __repr__ = __str__


class Items(list[Any]):
    """A list; its text is JSON."""

    def __str__(self) -> str:
        return json_text(self)

    __repr__ = __str__


def template_value(column: str, value: Any) -> Any:
    """The value of a column as a template sees it: binary values as text, nulls testable, structs and lists as JSON.

    Raises:
        RowFaultError: bytes that are not UTF-8; names the column and the byte.
    """
    if value is None:
        return Null(f"column {column!r}")
    if isinstance(value, str | int | float):
        return value
    return _nested(decoded(f"column {column!r}", value))


def _nested(value: Any) -> Any:
    if value is None:
        return Null("a value within a column")
    if isinstance(value, dict):
        return Fields({key: _nested(item) for key, item in value.items()})
    return Items(map(_nested, value)) if isinstance(value, list) else value


class RowEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the rules of this package.

    Attributes:
        functions: those of Jinja that a template may call, by name.
        limits: what a rendering may take; `begin` goes before each.
    """

    intercepted_binops = frozenset({"%", "*", "**", "+"})

    def __init__(self) -> None:
        # Prompts are what the user wrote: the last line break stays.
        super().__init__(undefined=Missing, finalize=self._printed, keep_trailing_newline=True)
        self.limits = RenderLimits()
        # Apart, so that a column may have the name of a function: no name of a template is Jinja's by itself.
        self.functions, self.globals = self.globals, {}
        self.functions["lipsum"] = self._lipsum
        self.tests["none"] = lambda value: value is None or isinstance(value, Null)
        for name in _FILTERS_OF_TEXT:
            self.filters[name] = _on_first(value_text, FILTERS[name])
        for name in _FILTERS_OF_DATA:
            self.filters[name] = _on_first(_only_data, FILTERS[name])
        self.filters |= {"string": value_text, "join": _joined, "format": _formatted}
        self.filters |= {"tojson": json_text, "pprint": functools.partial(json_text, indent=2)}
        self.filters = {name: self._counted(name, one) for name, one in self.filters.items()}

    def getattr(self, obj: Any, attribute: str) -> Any:
        """What `obj.attribute` is where it is not called: a field, or an attribute that is data (`day.year`)."""
        if isinstance(obj, Mapping):
            return self.getitem(obj, attribute)
        value = super().getattr(obj, attribute)
        if not callable(value) or isinstance(value, Undefined):
            return value
        return self.undefined(
            f"{attribute!r} is a method of {type(obj).__name__}, no value: call it as {attribute}()", obj, attribute
        )

    def getitem(self, obj: Any, argument: Any) -> Any:
        """What `obj[argument]` is: a field or an item; never a method."""
        if isinstance(obj, Mapping):
            try:
                return obj[argument]
            except (TypeError, LookupError):
                there = ", ".join(map(str, list(obj)[:_SHOWN_FIELDS]))
                return self.undefined(f"no field {argument!r}; fields: {there or 'none'}", obj, argument)
        try:
            return obj[argument]
        except (TypeError, LookupError):
            if isinstance(argument, str):
                return self.getattr(obj, argument)
            return self.undefined(obj=obj, name=argument)

    def method(self, obj: Any, name: str) -> Any:
        """What `obj.name` is where it is called; values are never called, so that a field is not in the way."""
        return super().getattr(obj, name)

    def function(self, name: str) -> Any:
        """The function of Jinja with this name, where it is called and a column has the name too."""
        return self.functions[name]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator that can make much of little; of `text % values` only data gets into the text."""
        self.limits.operator(operator, left, right)
        formats = operator == "%" and isinstance(left, str)
        return self.made(super().call_binop(context, operator, left, _only_data(right) if formats else right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call of a function, a macro or a method."""
        self.limits.method(obj, (*args, *kwargs.values()))
        return self.made(super().call(context, obj, *args, **kwargs))

    def turns(self, items: Iterable[Any]) -> Iterable[Any]:
        """The items of a loop, counted."""
        return self.limits.turns(items)

    def made(self, value: Any) -> Any:
        """A value that the template has made, counted."""
        return self.limits.made(value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`text.format(values)`: only data gets into the text."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            _only_data([args, kwargs])
            self.limits.formatted(value.__self__, *args, kwargs)
            return str(wrapped(*args, **kwargs))

        return formatted

    def _printed(self, value: Any) -> str:
        if isinstance(value, str):
            text = value
        else:
            self.limits.nested(value)
            text = value_text(value)
        self.limits.size(len(text))
        return text

    def _lipsum(self, n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
        self.limits.size(n * max * _CHARACTERS_OF_A_WORD)
        return generate_lorem_ipsum(n, html, min, max)

    def _counted(self, name: str, jinja_filter: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that counts what it is given and what it makes."""
        place = 1 if hasattr(jinja_filter, "jinja_pass_arg") else 0

        @functools.wraps(jinja_filter)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.limits.step()
            value, *others = args[place:]
            if name in _FILTERS_THAT_WRITE_DATA:
                self.limits.nested(value)
            if name in _FILTERS_WITH_WIDTHS:
                widths = [one for one in (*others, *kwargs.values()) if isinstance(one, int)]
                lines = value.count("\n") + 1 if isinstance(value, str) else 1
                self.limits.size(lines * builtins.max(widths, default=0))
            elif name == "replace" and isinstance(value, str):
                self.limits.replaced(value, *others[:2])
            elif name == "format" and isinstance(value, str):
                self.limits.formatted(value, *others, kwargs)
            return self.made(jinja_filter(*args, **kwargs))

        return counted


def _only_data(value: Any) -> Any:
    json_value(value)
    return value


def _on_first(change: Callable[[Any], Any], jinja_filter: Callable[..., Any]) -> Callable[..., Any]:
    """Jinja's filter, with its value changed before."""
    place = 1 if hasattr(jinja_filter, "jinja_pass_arg") else 0

    @functools.wraps(jinja_filter)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return jinja_filter(*args[:place], change(args[place]), *args[place + 1 :], **kwargs)

    return changed


@pass_environment
def _joined(environment: RowEnvironment, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    separator, texts = value_text(d), []
    for item in items:
        texts.append(value_text(item))
        environment.limits.size(len(texts[-1]) + len(separator))
    return separator.join(texts)


def _formatted(value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise TypeError("format: expected positional or named values, got both")
    _only_data([args, kwargs])
    return value_text(value) % (kwargs or args)
