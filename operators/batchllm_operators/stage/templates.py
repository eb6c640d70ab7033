"""Jinja templates over the columns of a row, in a sandbox."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from batchllm_operators.errors import RowErrorCode, TerminalError
from batchllm_operators.stage.faults import RowFaultError, invalid_row
from batchllm_operators.stage.special_tokens import SpecialTokens
from batchllm_operators.stage.template_columns import ROW
from batchllm_operators.stage.template_environment import Fields, RowEnvironment, template_value
from batchllm_operators.stage.template_limits import TemplateLimitError, count_effort
from batchllm_operators.stage.template_source import parse_template
from batchllm_operators.stage.value_text import NullValueError


class RowTemplate:
    """One template of the prompt.

    A name is a column, whatever Jinja would have made of it; `row` is the whole row, for columns whose names are no
    identifiers (`{{ row["Review Text"] }}`), unless a column is named `row`. A null column may be tested
    (`{% if notes %}`) and given a default (`{{ notes or "" }}`); a template that prints one makes the row an error. So
    does one that prints what is no data, such as a method that is not called.

    Args:
        source: the template's text; what it writes stays to the byte.
        field_name: where it stands in the job, for messages.
        columns: of the input; None where they are not known.
        special_tokens: those of the tokenizer, which the template's text keeps.

    Attributes:
        field_name: where it stands in the job.
        columns: those that it needs.

    Raises:
        TerminalError: the text is not a template, or could mean a column and is something else to Jinja.
    """

    def __init__(
        self,
        source: str,
        field_name: str,
        columns: Collection[str] | None = None,
        special_tokens: SpecialTokens | None = None,
    ) -> None:
        environment = RowEnvironment()
        known = tuple(columns or ())
        special = special_tokens or SpecialTokens()
        parsed = parse_template(environment, source, field_name, known, special.mark)
        count_effort(parsed.tree)
        self._limits = environment.limits
        self._whole = special.whole if special.found_in(source) else str
        try:
            code = environment.compile(parsed.tree)
        except Exception as error:
            # What is constant is printed while Jinja compiles, so that this is what a row would have raised.
            raise TerminalError(f"{field_name}: not a valid template: {error}") from error
        self._template = environment.template_class.from_code(environment, code, environment.functions)
        self._known = known
        self._names = parsed.names
        self._fields = parsed.fields
        self._whole_row = parsed.whole_row
        self.field_name = field_name
        self.columns = parsed.names | parsed.fields | (frozenset(known) if parsed.whole_row else frozenset())

    def render(self, record: Mapping[str, Any]) -> str:
        """The text for one row; a column that it lacks is null.

        Raises:
            RowFaultError: a null is printed or bytes are not UTF-8 (invalid_row), or the template fails on this row
                (template_error).
        """
        try:
            values = {name: template_value(name, record.get(name)) for name in self._names}
            if self._whole_row or self._fields:
                # In the order of the input's columns, so that equal rows give equal texts.
                names = dict.fromkeys([*self._known, *record]) if self._whole_row else self._fields
                values[ROW] = Fields({name: template_value(name, record.get(name)) for name in names})
            self._limits.begin()
            return self._whole(self._template.render(values))
        except RowFaultError:
            raise
        except TemplateLimitError as error:
            raise RowFaultError(RowErrorCode.TEMPLATE_ERROR, f"{self.field_name}: {error}") from None
        except NullValueError as error:
            raise invalid_row(f"{self.field_name}: expected a value to print, but {error}") from None
        except Exception as error:
            # Expressions of a template can raise anything on the values of a row.
            raise RowFaultError(
                RowErrorCode.TEMPLATE_ERROR, f"{self.field_name}: {type(error).__name__}: {error}"
            ) from error
