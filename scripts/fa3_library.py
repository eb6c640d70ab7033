"""Takes FlashAttention 3, as vLLM 0.32 has it, out of vLLM's wheel: the rival of the attention benchmark.

    python scripts/fa3_library.py WHEEL OUT.xz

WHEEL is a file, or `download` for the one that pip finds. The library, 170 MB, is compressed to about 8 MB.
`BATCHLLM_FA3_LIBRARY=OUT.xz` then gives it to `python -m batchllm_kernels.bench`.
It is vLLM's: nothing of it is kept in this repository.
"""

from __future__ import annotations

import lzma
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "vllm==0.32.*"
MEMBER = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"


def main(arguments: list[str]) -> int:
    """Writes the library; 2 when the arguments are wrong."""
    if len(arguments) != 2:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    target = Path(arguments[1])
    with tempfile.TemporaryDirectory() as folder:
        wheel = download(Path(folder)) if arguments[0] == "download" else Path(arguments[0])
        extract(wheel, target)
    sys.stdout.write(f"{target}: {target.stat().st_size / 1e6:.1f} MB\n")
    return 0


def download(folder: Path) -> Path:
    """The wheel for CUDA, x86-64, from the index that pip is set up with.

    Raises:
        subprocess.CalledProcessError: when pip finds none.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 31, 34, 35)]
    subprocess.run([*command, *platforms, "--dest", str(folder), REQUIREMENT], check=True)
    return next(folder.glob("vllm-*.whl"))


def extract(wheel: Path, target: Path) -> None:
    """Writes the library of a wheel, compressed.

    Raises:
        KeyError: when the wheel has no such library.
    """
    unfinished = target.with_name(target.name + ".part")
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(MEMBER) as source,
        lzma.open(unfinished, "wb", preset=9) as compressed,
    ):
        shutil.copyfileobj(source, compressed)
    unfinished.replace(target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
