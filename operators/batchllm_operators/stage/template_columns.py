"""The columns that a template means, and what is refused because it could mean one and is something else to Jinja.

Jinja has words and operators of its own: `{{ product-id }}` subtracts, `{{ true }}` is a constant. Where the input has
a column that such an expression could mean, the template is refused before any work, with what to write instead.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator

from jinja2 import nodes

ROW = "row"
"""The whole row, in a template over rows that have no column of this name."""

_CONSTANTS = {"true": "True", "false": "False", "none": "None", "True": "true", "False": "false", "None": "none"}
# Within these, Jinja gives a word a meaning of its own.
_OWN_WORDS: tuple[tuple[tuple[type[nodes.Node], ...], frozenset[str], str], ...] = (
    ((nodes.For,), frozenset(["loop"]), "the loop itself within {% for %}"),
    ((nodes.Macro, nodes.CallBlock), frozenset(["caller", "kwargs", "varargs"]), "a macro's own within {% macro %}"),
    ((nodes.Block,), frozenset(["super"]), "a block's own within {% block %}"),
)
_SHOWN_COLUMNS = 3


class AmbiguousTemplateError(ValueError):
    """The template could mean a column and is something else to Jinja; the message says what to write."""


def refuse_constants(tokens: Iterable[tuple[int, str, str]], columns: Collection[str]) -> None:
    """Refuse `true`, `none` and the like where a column has the name; where Jinja parses, they are constants already.

    Args:
        tokens: (line, kind, text), as Jinja's lexer gives them.
        columns: of the input.

    Raises:
        AmbiguousTemplateError: says how to write the column, and how the constant.
    """
    before = earlier = ""
    for line, kind, text in tokens:
        if kind == "whitespace":
            continue
        # `order.none` is a field, `notes is none` and `notes is not none` are tests.
        means_no_constant = before in (".", "is") or (earlier, before) == ("is", "not")
        if kind == "name" and text in _CONSTANTS and text in columns and not means_no_constant:
            raise AmbiguousTemplateError(
                f"{text!r} is a constant of Jinja and a column: write {written(text, columns)} for the column, or"
                f" {_CONSTANTS[text]} for the constant (line {line})"
            )
        earlier, before = before, text


def refuse_ambiguous(tree: nodes.Template, columns: Collection[str]) -> None:
    """Refuse expressions that could mean a column and do not.

    Raises:
        AmbiguousTemplateError: an expression that is spelled like a column (`product-id`, `a.b`), a number that is a
            column's name, a word that Jinja gives a meaning of its own where it stands, or another template.
    """
    for other in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise AmbiguousTemplateError(f"a prompt's template stands alone and includes no other (line {other.lineno})")
    if "self" in columns and any(name.name == "self" and name.ctx != "load" for name in tree.find_all(nodes.Name)):
        raise AmbiguousTemplateError("'self' is a column: expected the template to give its own value another name")
    spellings: dict[str | None, str] = {
        "".join(name.split()): name for name in columns if not name.isidentifier() and name.strip()
    }
    for node in tree.find_all((nodes.BinExpr, nodes.Getattr, nodes.Getitem, nodes.Filter)):
        name = spellings.get(_spelling(node))
        if name:
            raise AmbiguousTemplateError(
                f"{name!r} is a column, and here it is an expression: write {written(name, columns)} for the column"
                f"{_operation(node, columns)} (line {node.lineno})"
            )
    for output in tree.find_all(nodes.Output):
        for child in output.nodes:
            name = spellings.get(_spelling(child)) if isinstance(child, nodes.Const) else None
            if name:
                raise AmbiguousTemplateError(
                    f"{name!r} is a column, and here a number: write {written(name, columns)} (line {child.lineno})"
                )
    for kinds, words, meaning in _OWN_WORDS:
        for scope in tree.find_all(kinds):
            used = {name.name for part in _body_of(scope) for name in part.find_all(nodes.Name)}
            for name in sorted(used & words & set(columns)):
                raise AmbiguousTemplateError(
                    f"{name!r} is {meaning}, and a column: write {written(name, columns)} for the column, or rename it"
                    f" (line {scope.lineno})"
                )


def refuse_alike(names: Collection[str], columns: Collection[str]) -> None:
    """Refuse two names that Python, to which Jinja compiles, takes for one, such as `fi` with and without ligature.

    Raises:
        AmbiguousTemplateError: names them.
    """
    seen: dict[str, str] = {}
    for name in sorted(names):
        other = seen.setdefault(unicodedata.normalize("NFKC", name), name)
        if other != name:
            raise AmbiguousTemplateError(
                f"{other!r} and {name!r} are one name to Jinja: write {written(name, columns)} for the second"
            )


def refuse_printing_no_data(tree: nodes.Template, functions: Collection[str]) -> None:
    """Refuse to print a function of Jinja's (`{{ range }}`) where no column has its name, or `{{ none }}`.

    Raises:
        AmbiguousTemplateError: names it.
    """
    for output in tree.find_all(nodes.Output):
        for child in output.nodes:
            if isinstance(child, nodes.Name) and child.name in functions:
                raise AmbiguousTemplateError(
                    f"{child.name!r} is Jinja's own and no column: it cannot be printed (line {child.lineno})"
                )
            if isinstance(child, nodes.Const) and child.value is None:
                raise AmbiguousTemplateError(f"expected a value to print, got none (line {child.lineno})")


def syntax_advice(source: str, columns: Collection[str]) -> str:
    """What to write for the columns that a template which Jinja does not understand may have meant; or nothing."""
    meant = [
        name
        for name in columns
        if (not name.isidentifier() and name in source) or re.search(rf"{{{{-?\s*{re.escape(name)}\s*-?}}}}", source)
    ]
    written_as = [f"{written(name, columns)} for column {name!r}" for name in meant[:_SHOWN_COLUMNS] if name]
    return f"; write {', '.join(written_as)}" if written_as else ""


def written(name: str, columns: Collection[str]) -> str:
    """How a template names a column whatever its name is."""
    taken = " (not while a column is named row: rename that one)" if ROW in columns else ""
    return f"{ROW}[{json.dumps(name, ensure_ascii=False)}]{taken}"


def fields_of_row(tree: nodes.Template) -> tuple[frozenset[str], bool]:
    """Columns that a template names as fields of `row`, and whether it uses the row in any other way."""
    if any(name.name == ROW and name.ctx != "load" for name in tree.find_all(nodes.Name)):
        return frozenset(), True  # `row` is a name of the template's own in places
    fields: set[str] = set()
    uses = sum(name.name == ROW for name in tree.find_all(nodes.Name))
    for field in _constant_fields(tree):
        fields.add(field)
        uses -= 1
    return frozenset(fields), uses > 0


def _constant_fields(tree: nodes.Template) -> Iterator[str]:
    """Names in `row.name` and `row["name"]`, once for each."""
    for attribute in tree.find_all(nodes.Getattr):
        if isinstance(attribute.node, nodes.Name) and attribute.node.name == ROW:
            yield attribute.attr
    for item in tree.find_all(nodes.Getitem):
        of_row = isinstance(item.node, nodes.Name) and item.node.name == ROW
        if of_row and isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, str):
            yield item.arg.value


def _body_of(scope: nodes.Node) -> list[nodes.Node]:
    body: list[nodes.Node] = getattr(scope, "body")  # noqa: B009 - of the kinds that have one
    return body


def _spelling(node: nodes.Node) -> str | None:
    """An expression as it may stand in a template, without white space; None where it cannot be a column's name."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Const):
        return str(node.value) if type(node.value) in (int, float) else None
    if isinstance(node, nodes.BinExpr):
        return _joined(node.left, node.operator, node.right)
    if isinstance(node, nodes.Getattr):
        return _joined(node.node, ".", nodes.Name(node.attr, "load"))
    if isinstance(node, nodes.Getitem):
        return _joined(node.node, ".", node.arg)
    if isinstance(node, nodes.Filter) and node.node is not None and not node.args and not node.kwargs:
        return _joined(node.node, "|", nodes.Name(node.name, "load"))
    return None


def _joined(left: nodes.Node, between: str, right: nodes.Node) -> str | None:
    one, other = _spelling(left), _spelling(right)
    return None if one is None or other is None else f"{one}{between}{other}"


def _operation(node: nodes.Node, columns: Collection[str]) -> str:
    """How to write the operation itself, where the names that it takes are columns too."""
    names: Iterator[nodes.Name] = node.find_all(nodes.Name)
    if not isinstance(node, nodes.BinExpr) or not all(name.name in columns for name in names):
        return ""
    if not isinstance(node.left, nodes.Name) or not isinstance(node.right, nodes.Name):
        return ""
    operands = [written(side.name, columns) for side in (node.left, node.right)]
    return f", {operands[0]} {node.operator} {operands[1]} for the operation"
