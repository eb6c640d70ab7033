"""Schemes of URIs: which stores we know, and which take a package that may be missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from batchllm_operators.errors import TerminalError

_OWN_SCHEMES = ("", "file", "local", "s3", "s3a")
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs", "hf": "huggingface_hub"}


def is_foreign(uri: str) -> bool:
    """Whether a URI is of a store that only fsspec's packages know."""
    return urlsplit(uri).scheme not in _OWN_SCHEMES


@contextmanager
def refusing_unknown_schemes(uri: str) -> Iterator[None]:
    """For opening a filesystem of fsspec.

    Raises:
        TerminalError: names the package to install, or says that there is no such scheme.
    """
    scheme = urlsplit(uri).scheme
    try:
        yield
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        install = f"pip install {package}" if package else str(error)
        raise TerminalError(f"{scheme}:// needs a package that is not installed: {install}", uri=uri) from error
    except TypeError as error:
        # Its filesystem takes arguments that a job cannot give, as `ftp://` does.
        raise TerminalError(
            f"{scheme}:// cannot be opened by its address alone ({error}); expected s3://bucket/prefix or a local path",
            uri=uri,
        ) from error
    except ValueError as error:
        raise TerminalError(
            f"unknown scheme {scheme}://; expected s3://bucket/prefix or a local path", uri=uri
        ) from error
