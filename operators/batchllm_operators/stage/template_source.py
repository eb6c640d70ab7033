"""The source of a template on its way to Jinja's code."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.visitor import NodeTransformer

from batchllm_operators.errors import TerminalError
from batchllm_operators.stage.template_columns import (
    ROW,
    AmbiguousTemplateError,
    fields_of_row,
    refuse_alike,
    refuse_ambiguous,
    refuse_constants,
    refuse_printing_no_data,
    syntax_advice,
)
from batchllm_operators.stage.template_environment import RowEnvironment

# White space to Jinja and to hardly anybody else: one stands for a carriage return while Jinja reads the source.
_STAND_INS = "\x1c\x1d\x1e\x1f\x85\u2028\u2029\u1680\u205f\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2008\u2009\u200a"
# The arguments of other filters, tests and methods are looked for in a row's text, or count characters.
_FILTERS_THAT_WRITE = ("default", "d", "join")


@dataclass(frozen=True)
class ParsedTemplate:
    """A template that Jinja can compile.

    Attributes:
        tree: the template.
        names: columns that it names as variables.
        fields: columns that it names as fields of `row`.
        whole_row: whether it uses `row` in any other way, and so may need any column.
    """

    tree: nodes.Template
    names: frozenset[str]
    fields: frozenset[str]
    whole_row: bool


def parse_template(
    environment: RowEnvironment,
    source: str,
    field_name: str,
    columns: Collection[str],
    mark: Callable[[str], str],
) -> ParsedTemplate:
    r"""Parse a template over the columns of a row.

    Args:
        environment: Jinja's.
        source: the template's text; what it writes stays to the byte, `\r\n` and the last line break included.
        field_name: where it stands in the job, for messages.
        columns: of the input, as far as they are known.
        mark: applied to the texts that the template writes, not to those that it compares or looks for.

    Raises:
        TerminalError: it is no template, or means something else than the column of that name.
    """
    try:
        stand_in = _stand_in(environment, source)
        readable = source.replace("\r", stand_in)
        refuse_constants(environment.lex(readable), columns)
        tree = environment.parse(readable)
        refuse_ambiguous(tree, columns)
        stored = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
        meant = _Meanings(environment, frozenset(columns), frozenset(environment.functions.keys() & columns) - stored)
        meant.visit(tree)
        tree.set_environment(environment)
        undeclared = meta.find_undeclared_variables(tree)
        functions = (environment.functions.keys() | {"self"}) - set(columns)
        refuse_printing_no_data(tree, functions - stored)
        names = undeclared - functions | meant.columns
        refuse_alike(names, columns)
    except TemplateSyntaxError as error:
        advice = syntax_advice(source, columns)
        raise TerminalError(
            f"{field_name}: not a valid template: {error.message} (line {error.lineno}){advice}"
        ) from error
    except AmbiguousTemplateError as error:
        raise TerminalError(f"{field_name}: {error}") from error
    fields, whole_row = frozenset[str](), False
    if ROW in names and ROW not in columns:
        fields, whole_row = fields_of_row(tree)
        names -= {ROW}
    _change_texts(tree, lambda text, writes: _written(text.replace(stand_in, "\r"), mark, writes), writes=True)
    return ParsedTemplate(tree, frozenset(names), fields, whole_row)


def _stand_in(environment: RowEnvironment, source: str) -> str:
    """A character that stands for a carriage return in the source and occurs in no text of the template."""
    if "\r" not in source:
        return "\r"
    constants = environment.parse(source).find_all(nodes.Const)
    texts = source + "".join(one.value for one in constants if isinstance(one.value, str))
    found = next((one for one in _STAND_INS if one not in texts), None)
    if found is None:
        raise AmbiguousTemplateError("expected a template without all of Unicode's rare white space characters")
    return found


class _Meanings(NodeTransformer):
    """Gives expressions the meaning that they have here, before Jinja looks at their names.

    What is called is a method or function, whatever a field or column of that name holds, since values are never
    called; the column `self` is a column; `a ~ b` joins texts as they would be printed.
    """

    def __init__(self, environment: RowEnvironment, columns: frozenset[str], functions: frozenset[str]) -> None:
        self._environment = environment
        self._names_self = "self" in columns
        self._functions = functions
        self.columns: frozenset[str] = frozenset()

    def visit_Call(self, node: nodes.Call) -> nodes.Node:  # noqa: N802 - a visitor of Jinja's
        """Look for the method, or for the function."""
        target = node.node
        self.generic_visit(node)
        if isinstance(target, nodes.Getattr):
            node.node = self._call("method", [target.node, nodes.Const(target.attr)], node.lineno)
        elif isinstance(target, nodes.Name) and target.name in self._functions:
            node.node = self._call("function", [nodes.Const(target.name)], node.lineno)
        return node

    def visit_Name(self, node: nodes.Name) -> nodes.Node:  # noqa: N802
        """Take the column `self` from the row."""
        if node.name != "self" or not self._names_self:
            return node
        self.columns = frozenset(["self"])
        return nodes.Getitem(nodes.ContextReference(), nodes.Const("self"), "load", lineno=node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """Make texts of what is joined."""
        self.generic_visit(node)
        node.nodes = [nodes.Filter(one, "string", [], [], None, None, lineno=node.lineno) for one in node.nodes]
        return node

    def _call(self, name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
        function = nodes.EnvironmentAttribute(name)
        return nodes.Call(function, arguments, [], None, None, lineno=line)


def _written(text: str, mark: Callable[[str], str], writes: bool) -> str:
    return mark(text) if writes else text


def _change_texts(node: nodes.Node, change: Callable[[str, bool], str], *, writes: bool) -> None:
    """Change the constant texts below a node; with each goes whether the template writes it."""
    if isinstance(node, nodes.TemplateData):
        node.data = change(node.data, writes)
    elif isinstance(node, nodes.Const) and isinstance(node.value, str):
        node.value = change(node.value, writes)
    elif isinstance(node, nodes.Filter | nodes.Test):
        _change_each(node, ("node",), change, writes=writes and isinstance(node, nodes.Filter))
        inner = writes and isinstance(node, nodes.Filter) and node.name in _FILTERS_THAT_WRITE
        _change_each(node, ("args", "kwargs", "dyn_args", "dyn_kwargs"), change, writes=inner)
    elif isinstance(node, nodes.Call):
        # The macros of a template write what they are given; methods look for it.
        _change_each(node, None, change, writes=writes and isinstance(node.node, nodes.Name))
    elif isinstance(node, nodes.Getitem):
        _change_each(node, ("node",), change, writes=writes)
        _change_each(node, ("arg",), change, writes=False)
    else:
        _change_each(node, None, change, writes=writes and not isinstance(node, nodes.Compare))


def _change_each(
    node: nodes.Node, names: tuple[str, ...] | None, change: Callable[[str, bool], str], *, writes: bool
) -> None:
    for child in node.iter_child_nodes(only=names):
        _change_texts(child, change, writes=writes)
