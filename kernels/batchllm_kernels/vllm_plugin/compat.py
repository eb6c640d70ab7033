"""The versions of vLLM that this plugin works with, read back from the requirements of our own distribution."""

from __future__ import annotations

from importlib.metadata import requires

DISTRIBUTION = "batchllm-flows"


def supported_versions() -> str:
    """Version specifier of vLLM in our extra `engine`, e.g. `==0.32.*`.

    Raises:
        LookupError: our distribution requires no vLLM, which would be a fault of its packaging.
    """
    from packaging.requirements import Requirement

    requirements = map(Requirement, requires(DISTRIBUTION) or ())
    found = next((str(one.specifier) for one in requirements if one.name == "vllm"), None)
    if found is None:
        raise LookupError(f"{DISTRIBUTION}: expected a requirement of vllm in its metadata")
    return found


def check_vllm_version() -> None:
    """Refuse a vLLM outside the window.

    Raises:
        RuntimeError: naming both versions.
    """
    import vllm
    from packaging.specifiers import SpecifierSet

    expected = supported_versions()
    # The local part of a version, as a build from source has it, says nothing about the interfaces.
    if not SpecifierSet(expected).contains(str(vllm.__version__).split("+")[0], prereleases=True):
        raise RuntimeError(f"vLLM: expected version {expected}, got {vllm.__version__}")
