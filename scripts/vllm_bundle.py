"""Packs vLLM for a bare GPU machine that has torch but no vLLM and no network, as `scripts/gpu_check.sh` is for.

    python scripts/vllm_bundle.py OUT.tar.xz [--python 3.12] [--architecture 90]

and there:

    mkdir site && tar -xJf OUT.tar.xz -C site && export PYTHONPATH=site:operators:kernels
    VLLM_USE_FLASHINFER_SAMPLER=0 python benchmarks/attention_in_vllm.py RESULTS \\
        --engine-args '{"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}'

OUT (about 50 MB) holds vLLM 0.32 as its wheel for CUDA has it, the packages that it needs beside torch, transformers
and what comes with those, and the entry points of this project, so that vLLM finds its plugin. Left out are the code
for other GPUs, FlashAttention 2, mixture-of-experts kernels, and vendored kernels of models that nobody measures here.
Nothing of it is kept in this repository.

vLLM's libraries keep to torch's stable ABI, so that they load beside an older torch than vLLM asks for (2.11 was
tried). What needs the torch of its day is compilation by Inductor, hence the arguments above.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

VLLM = "vllm==0.32.*"
PLATFORMS = (*(f"manylinux_2_{minor}" for minor in range(39, 16, -1)), "manylinux2014", "manylinux1")
"""pip takes a wheel for exactly these, and not for those that a newer one includes."""
KEPT_LIBRARIES = ("vllm/_C_stable_libtorch.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so")
LEFT_OUT = ("vllm/vllm-rs", "vllm/third_party/fmha_sm100/", "vllm/third_party/deep_gemm/")
NEEDED = (
    *(
        "anthropic",
        "blake3",
        "cachetools",
        "cbor2",
        "fastapi",
        "ijson",
        "lark",
        "llguidance",
        "loguru",
        "mcp",
        "msgspec",
    ),
    *("openai", "opentelemetry-api", "opentelemetry-sdk", "opentelemetry-semantic-conventions", "oss-harmony"),
    *("partial-json-parser", "pybase64", "pydantic", "python-json-logger", "pyzmq", "setproctitle"),
)
"""What vLLM imports beside torch, numpy, transformers and what comes with them."""
NEEDED_ALONE = ("compressed-tensors", "xgrammar", "apache-tvm-ffi")
"""The same, of packages that would bring torch."""

FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)
MACHINE_CODE = 2
"""The kind of a fatbin's entry that is no PTX."""

_FOR_OLDER_TORCH = """\
import torch as _torch

if not hasattr(_torch.accelerator, "empty_host_cache"):
    _torch.accelerator.empty_host_cache = lambda: None

"""


def main(arguments: list[str] | None = None) -> None:
    """Writes the bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the bundle to write, OUT.tar.xz")
    parser.add_argument("--python", default="3.12", help="version of the GPU machine's Python")
    parser.add_argument("--architecture", type=int, default=90, help="of its GPU, 90 is an H100's")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        site, wheels = Path(folder) / "site", Path(folder) / "wheels"
        target = _target_options(options.python)
        _pip("download", "--no-deps", "--dest", str(wheels), *target, VLLM)
        (wheel,) = wheels.iterdir()
        with zipfile.ZipFile(wheel) as archive:
            asked = _asked_versions(archive)
            for name in filter(_is_kept, archive.namelist()):
                archive.extract(name, site)
        for library in site.rglob("vllm/**/*.so"):
            library.write_bytes(one_architecture(library.read_bytes(), options.architecture))
        to_site = ("install", "--no-compile", "--target", str(site), *target)
        _pip(*to_site, *(name + asked.get(name, "") for name in NEEDED))
        _pip(*to_site, "--no-deps", *(name + asked.get(name, "") for name in NEEDED_ALONE))
        start = site / "vllm" / "__init__.py"
        start.write_text(_FOR_OLDER_TORCH + start.read_text())
        _write_entry_points(site)
        with tarfile.open(options.out, "w:xz", preset=4) as bundle:
            bundle.add(site, ".", filter=lambda member: None if member.name.startswith("./bin") else member)
    sys.stdout.write(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB\n")


def _is_kept(name: str) -> bool:
    return name in KEPT_LIBRARIES or not (name.endswith(".so") or name.startswith(LEFT_OUT))


def one_architecture(library: bytes, architecture: int) -> bytes:
    """A library whose GPU code for other architectures is zeros; the loader passes over it as before.

    A fatbin is a header (magic, version, size of the header, size of what follows) and entries, each with a header of
    its own: kind, version, size of the header, size of the code, and at byte 28 the architecture.
    """
    data, place = bytearray(library), 0
    while (place := data.find(FATBIN_MAGIC, place)) >= 0:
        _, version, header, size = struct.unpack_from("<IHHQ", data, place)
        if version != 1 or header != 16 or place + header + size > len(data):
            place += len(FATBIN_MAGIC)
            continue
        entry, place = place + header, place + header + size
        while entry < place:
            kind, _, entry_header, code = struct.unpack_from("<HHIQ", data, entry)
            (of_architecture,) = struct.unpack_from("<I", data, entry + 28)
            begin = entry + entry_header
            if (kind, of_architecture) != (MACHINE_CODE, architecture):
                data[begin : begin + code] = bytes(code)
            entry = begin + code
    return bytes(data)


def _asked_versions(wheel: zipfile.ZipFile) -> dict[str, str]:
    """The versions that vLLM asks for, by package."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    asked = message_from_bytes(wheel.read(name)).get_all("Requires-Dist", [])
    found = (re.fullmatch(r"([\w.-]+)(\[\w+\])?\s*([^;]*)", one.partition(";")[0].strip()) for one in asked)
    return {re.sub(r"[-_.]+", "-", one[1]).lower(): one[3] for one in found if one}


def _write_entry_points(site: Path) -> None:
    """Let vLLM find the plugin of this project, whose code is on the path and not installed."""
    folder = site / "batchllm_flows-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: batchllm-flows\nVersion: 0\n")
    (folder / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nbatchllm = batchllm_kernels.vllm_plugin:register\n"
    )


def _target_options(python: str) -> list[str]:
    platforms = [option for platform in PLATFORMS for option in ("--platform", f"{platform}_x86_64")]
    return ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


if __name__ == "__main__":
    main()
