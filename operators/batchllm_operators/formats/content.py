"""What an object seems to be by its first bytes, where it is not of the format that a job asks for."""

from __future__ import annotations

import codecs

from batchllm_operators.format_names import FORMATS

COMPRESSIONS = {
    ".gz": ("gzip", b"\x1f\x8b"),
    ".bz2": ("bzip2", b"BZh"),
    ".zst": ("zstd", b"\x28\xb5\x2f\xfd"),
    ".lz4": ("lz4", b"\x04\x22\x4d\x18"),
    ".xz": ("xz", b"\xfd7zXZ\x00"),
}
"""Ending of compressed objects -> name of the compression, and how its data begin."""

_OTHER_CONTENT = {
    b"ORC": "an ORC object: convert it to Parquet or JSON Lines",
    b"Obj\x01": "an Avro object: convert it to Parquet or JSON Lines",
    b"FEA1": "an object of Feather's first version: convert it to Parquet or Arrow",
    b"PK\x03\x04": "a ZIP archive: unpack it",
    b"\xff\x06\x00\x00sNaPpY": "data in Snappy's frames: compress it with gzip or zstd instead",
    b"\x1f\x9d": "data of compress(1): compress it with gzip or zstd instead",
}


def foreign_content(head: bytes, asked: str) -> str | None:
    """What an object that is not of a format seems to be, and what to do about it; None where nothing tells.

    Args:
        head: its first bytes, 16 or more.
        asked: name of the format it was taken for.
    """
    for form in FORMATS.in_use():
        if form.name != asked and form.reader is not None and form.reader.recognises(head):
            return f"{form.content}: set source.format to {form.name}"
    return next((what for magic, what in _OTHER_CONTENT.items() if head.startswith(magic)), None)


def is_markup(text: bytes) -> bool:
    """Whether it begins as HTML or XML does, such as the error page that a server gave in place of an object."""
    return text.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"<")
