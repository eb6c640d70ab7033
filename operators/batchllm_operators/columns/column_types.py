"""Types of columns over several objects: which one holds the values of all, and how values get it."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

_EXACT_IN_DOUBLE_BITS = 32  # wider integers may have more digits than a double's 53 bits
_EXACT_IN_FLOAT_BITS = 16
_DIGITS_OF_BITS = {8: 3, 16: 5, 32: 10, 64: 20}


def with_leaves(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """The type with each type that has no others within it replaced by what `leaf` makes of it."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(with_leaves(field.type, leaf)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(with_leaves(kind.key_type, leaf), with_leaves(kind.item_type, leaf))
    if _is_list(kind):
        value = kind.value_field.with_type(with_leaves(kind.value_type, leaf))
        if isinstance(kind, pa.FixedSizeListType):
            return pa.list_(value, kind.list_size)
        return pa.large_list(value) if isinstance(kind, pa.LargeListType) else pa.list_(value)
    return leaf(kind)


def plain(kind: pa.DataType) -> pa.DataType:
    """The type without an encoding that only some objects may use (dictionaries, views), at any depth."""
    return with_leaves(kind, _plain_leaf)


def _plain_leaf(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain(kind.value_type)
    if kind == pa.string_view():
        return pa.string()
    return pa.binary() if kind == pa.binary_view() else kind


def has_form(kind: pa.DataType) -> bool:
    """Whether Parquet and JSON have a form for values of a type: they have none for unions and calendar intervals."""
    formless: list[pa.DataType] = []

    def look(leaf: pa.DataType) -> pa.DataType:
        if pa.types.is_union(leaf) or pa.types.is_interval(leaf):
            formless.append(leaf)
        return leaf

    with_leaves(plain(kind), look)
    return not formless


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that a column has where it is of these types in two objects; None where they do not go together.

    Text beside binary is text. Whether all values fit is another question, see `always_fits`.
    """
    if one.equals(other) or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        return _common_struct(one, other)
    if pa.types.is_map(one) and pa.types.is_map(other):
        key, item = common_type(one.key_type, other.key_type), common_type(one.item_type, other.item_type)
        return None if key is None or item is None else pa.map_(key, item)
    if _is_list(one) and _is_list(other):
        value = common_type(one.value_type, other.value_type)
        is_large = any(isinstance(kind, pa.LargeListType) for kind in (one, other))
        return None if value is None else pa.large_list(value) if is_large else pa.list_(value)
    if (_is_text(one) and _is_binary(other)) or (_is_binary(one) and _is_text(other)):
        is_large = any(pa.types.is_large_string(kind) or pa.types.is_large_binary(kind) for kind in (one, other))
        return pa.large_string() if is_large else pa.string()
    try:
        schemas = [pa.schema([("column", one)]), pa.schema([("column", other)])]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


def always_fits(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether every value of a type is one of the wanted type, without a look at the values.

    Bytes always go to text: those that are no UTF-8 are found where the text is read.
    """
    if kind.equals(wanted) or pa.types.is_null(kind):
        return True
    if pa.types.is_struct(kind) and pa.types.is_struct(wanted):
        return all(
            wanted.get_field_index(field.name) >= 0 and always_fits(field.type, wanted.field(field.name).type)
            for field in kind
        )
    if pa.types.is_map(kind) and pa.types.is_map(wanted):
        return always_fits(kind.key_type, wanted.key_type) and always_fits(kind.item_type, wanted.item_type)
    if _is_list(kind) and _is_list(wanted):
        return always_fits(kind.value_type, wanted.value_type)
    if pa.types.is_integer(kind):
        return _integer_fits(kind, wanted)
    if pa.types.is_floating(kind):
        return bool(pa.types.is_floating(wanted) and kind.bit_width <= wanted.bit_width)
    if pa.types.is_decimal(kind) and pa.types.is_decimal(wanted):
        whole_digits = kind.precision - kind.scale
        return bool(kind.scale <= wanted.scale and whole_digits <= wanted.precision - wanted.scale)
    return (_is_text(kind) or _is_binary(kind)) and (_is_text(wanted) or (_is_binary(kind) and _is_binary(wanted)))


def converted(array: pa.Array, wanted: pa.DataType) -> pa.Array:
    """The array as another type.

    Bytes become text unchecked, whether or not they are UTF-8: a reader of the text finds out.

    Raises:
        pa.ArrowException: a value does not convert, or only with a loss.
    """
    if array.type.equals(wanted):
        return array
    if pa.types.is_integer(array.type) and pa.types.is_decimal(wanted):
        array = array.cast(pa.string())  # Arrow wants room for the largest integer of the type, whatever the values
    return pc.cast(array, options=pc.CastOptions(target_type=wanted, allow_invalid_utf8=True))


def refuse_lost_values(array: pa.Array, wanted: pa.DataType) -> None:
    """Refuse a conversion that is not lossless: the values must come back.

    Raises:
        pa.ArrowException: a value does not convert, or does not come back as it was.
    """
    back = converted(converted(array, wanted), array.type)
    if not all(map(_same, leaves(array), leaves(back))):
        raise pa.ArrowInvalid(f"values change on their way from {array.type} to {wanted}")


def leaves(array: pa.Array) -> list[pa.Array]:
    """The arrays that hold the values of an array of structs, lists and maps; of any other, the array itself."""
    kind = array.type
    if pa.types.is_struct(kind):
        return [leaf for child in array.flatten() for leaf in leaves(child)]
    if pa.types.is_map(kind):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return [leaf for child in (array.keys, array.items) for leaf in leaves(child.slice(first, last - first))]
    if _is_list(kind) or isinstance(kind, pa.ListViewType | pa.LargeListViewType):
        return leaves(array.flatten())
    return [array]


def _same(one: pa.Array, other: pa.Array) -> bool:
    """Whether two arrays hold the same values, NaN being the same as NaN."""
    if not pa.types.is_floating(one.type):
        return bool(one.equals(other))
    nan_in_both = pc.and_kleene(pc.is_nan(one), pc.is_nan(other))
    same = pc.or_kleene(pc.equal(one, other), nan_in_both)
    return one.is_valid().equals(other.is_valid()) and bool(pc.all(same, min_count=0).as_py())


def _common_struct(one: pa.StructType, other: pa.StructType) -> pa.DataType | None:
    names = [field.name for field in one]
    more = [field.name for field in other]
    if len(set(names)) < len(names) or len(set(more)) < len(more):
        return None  # which of two fields of one name would be the other's, nobody knows
    types: dict[str, pa.DataType] = {field.name: field.type for field in one}
    for field in other:
        known = types.get(field.name)
        found = field.type if known is None else common_type(known, field.type)
        if found is None:
            return None
        types[field.name] = found
    return pa.struct(list(types.items()))


def _integer_fits(kind: pa.DataType, wanted: pa.DataType) -> bool:
    bits = kind.bit_width
    if pa.types.is_integer(wanted):
        if pa.types.is_signed_integer(kind):
            return bool(pa.types.is_signed_integer(wanted) and bits <= wanted.bit_width)
        return bool(bits < wanted.bit_width or (pa.types.is_unsigned_integer(wanted) and bits <= wanted.bit_width))
    if pa.types.is_decimal(wanted):
        return bool(_DIGITS_OF_BITS[bits] <= wanted.precision - wanted.scale)
    return (bool(pa.types.is_float64(wanted)) and bits <= _EXACT_IN_DOUBLE_BITS) or (
        bool(pa.types.is_float32(wanted)) and bits <= _EXACT_IN_FLOAT_BITS
    )


def _is_list(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))
