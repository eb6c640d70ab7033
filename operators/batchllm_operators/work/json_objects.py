"""Objects of JSON, each one record: one writer, and one reader with the policy of `damage`."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from batchllm_operators.errors import DamagedObjectError
from batchllm_operators.store import Store
from batchllm_operators.wording import fault_text
from batchllm_operators.work.damage import leave_out

Kind = TypeVar("Kind", bound=BaseModel)


def write_record(store: Store, name: str, record: BaseModel) -> None:
    """Write a record as an object, replacing one of the same name."""
    store.write_bytes(name, record.model_dump_json(indent=2).encode())


def read_record(kind: type[Kind], store: Store, name: str, *, only_looks: bool = False) -> Kind | None:
    """The record in an object; None where there is none, or a damaged one.

    Args:
        kind: of the record.
        store: the folder.
        name: of the object.
        only_looks: a damaged object stays where it is; else it is set aside.
    """
    try:
        return checked_record(kind, store, name)
    except DamagedObjectError as error:
        leave_out(store, name, error, only_looks=only_looks)
        return None


def checked_record(kind: type[Kind], store: Store, name: str) -> Kind | None:
    """The record in an object; None where there is none.

    Raises:
        DamagedObjectError: the object is not as this version writes it; its cause is pydantic's `ValidationError`.
    """
    content = store.content(name)
    if content is None:
        return None
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise DamagedObjectError(f"not as it is written: {first_fault(error)}", uri=store.uri_of(name)) from error


def first_fault(error: ValidationError) -> str:
    """Where a record is not valid, and why, without its content."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(piece) for piece in fault["loc"])
    message = fault_text(fault["msg"])
    return f"{where}: {message}" if where else message
