"""Ways to damage objects."""

from __future__ import annotations

import io
from collections.abc import Callable

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from batchllm_operators.store import Store

Damage = Callable[[bytes], bytes]


def flip(column: str) -> Damage:
    """One bit at the end of a column's last page in the first row group."""

    def damage(content: bytes) -> bytes:
        group = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0)
        chunks = [group.column(number) for number in range(group.num_columns)]
        chunk = next(chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
        begin = chunk.dictionary_page_offset or chunk.data_page_offset
        place = begin + chunk.total_compressed_size - 2
        return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]

    return damage


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def empty(content: bytes) -> bytes:
    return b""


def replace(new: bytes) -> Damage:
    return lambda _: new


def append(content: bytes) -> bytes:
    return content + b"and more"


def flip_last_bits(content: bytes) -> bytes:
    return content[:-6] + bytes(byte ^ 255 for byte in content[-6:])


def without_field(name: str) -> Damage:
    """A JSON object as an older version wrote it."""

    def damage(content: bytes) -> bytes:
        values = orjson.loads(content)
        del values[name]
        return orjson.dumps(values)

    return damage


def with_field(name: str, value: object) -> Damage:
    return lambda content: orjson.dumps(orjson.loads(content) | {name: value})


def parquet(**columns: pa.Array) -> bytes:
    """A Parquet object of somebody else."""
    content = io.BytesIO()
    pq.write_table(pa.table(columns), content)
    return content.getvalue()


def damage(store: Store, name: str, how: Damage) -> None:
    store.write_bytes(name, how(store.read_bytes(name)))
