"""The fault of one row, on its way from where it is found to the row."""

from __future__ import annotations

from batchllm_operators.errors import RowError, RowErrorCode


class RowFaultError(Exception):
    """This row makes no request; caught per row, never seen by a caller of a step."""

    def __init__(self, code: RowErrorCode, message: str) -> None:
        super().__init__(message)
        self.error = RowError(code, message)


def invalid_row(message: str) -> RowFaultError:
    """The fault of a row whose values are not what the job expects."""
    return RowFaultError(RowErrorCode.INVALID_ROW, message)
