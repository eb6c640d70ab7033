"""What a CPU is fast at, from what Linux says of it and what oneDNN may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchllm_operators.machine.processor import cpu_name, processor

ZEN3 = "flags\t\t: fpu sse4_2 avx avx2 fma"
SKYLAKE = "flags\t\t: fpu avx2 avx512f avx512bw avx512_vnni"
TURIN = "flags\t\t: fpu avx2 avx512f avx512bw avx512_bf16"
SAPPHIRE_RAPIDS = f"{TURIN} amx_bf16 amx_tile"
GRAVITON2 = "Features\t: fp asimd crc32"
GRAVITON3 = "Features\t: fp asimd sve i8mm bf16"
PLAIN = "neither AVX512-BF16 nor AMX-BF16"


@pytest.mark.parametrize(
    ("cpu_info", "machine", "limit", "fast_bf16", "avx512", "reason"),
    [
        (ZEN3, "x86_64", None, False, False, PLAIN),
        (SKYLAKE, "x86_64", None, False, True, PLAIN),
        (SKYLAKE, "x86_64", "AVX2", False, False, PLAIN),
        (TURIN, "x86_64", None, True, True, "has AVX512-BF16"),
        (TURIN, "x86_64", "DEFAULT", True, True, "has AVX512-BF16"),
        (TURIN, "x86_64", "AVX512_CORE_BF16", True, True, "has AVX512-BF16"),
        (TURIN, "x86_64", "AVX512_CORE", False, True, "ONEDNN_MAX_CPU_ISA=AVX512_CORE keeps oneDNN from"),
        (TURIN, "x86_64", "avx2", False, False, "ONEDNN_MAX_CPU_ISA=AVX2 keeps oneDNN from"),
        (SAPPHIRE_RAPIDS, "AMD64", None, True, True, "has AVX512-BF16 and AMX-BF16"),
        (SAPPHIRE_RAPIDS, "x86_64", "AVX2_VNNI_2", False, False, "AVX2_VNNI_2 keeps oneDNN from"),
        (GRAVITON2, "aarch64", None, False, False, "has no Arm bf16 instructions"),
        (GRAVITON3, "aarch64", None, True, False, "has Arm bf16 instructions"),
        ("", "x86_64", None, False, False, PLAIN),
        ("", "ppc64le", None, None, False, "nothing is known of bfloat16 on ppc64le"),
    ],
)
def test_bfloat16_is_fast_where_the_processor_has_it_and_onednn_may_use_it(
    cpu_info: str, machine: str, limit: str | None, fast_bf16: bool | None, avx512: bool, reason: str, tmp_path: Path
) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text(f"processor\t: 0\nmodel name\t: Abacus\n{cpu_info}\n\nprocessor\t: 1\n{cpu_info}\n")
    found = processor({} if limit is None else {"ONEDNN_MAX_CPU_ISA": limit}, told, machine)
    assert (found.fast_bf16, found.avx512) == (fast_bf16, avx512)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("cpu_info", "machine", "limit", "fast"),
    [
        (TURIN, "x86_64", None, False),
        (f"{SAPPHIRE_RAPIDS} avx512_fp16", "x86_64", None, True),
        (f"{SAPPHIRE_RAPIDS} avx512_fp16", "x86_64", "AVX512_CORE_BF16", False),
        (f"{GRAVITON2} asimdhp", "aarch64", None, True),
        ("", "ppc64le", None, None),
    ],
)
def test_float16_needs_instructions_of_its_own(
    cpu_info: str, machine: str, limit: str | None, fast: bool | None, tmp_path: Path
) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text(cpu_info)
    assert processor({} if limit is None else {"ONEDNN_MAX_CPU_ISA": limit}, told, machine).fast_fp16 is fast


def test_the_older_name_of_the_limit_counts_too(tmp_path: Path) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text(TURIN)
    assert processor({"DNNL_MAX_CPU_ISA": "AVX2"}, told, "x86_64").fast_bf16 is False


def test_a_machine_without_cpuinfo_has_nothing_special(tmp_path: Path) -> None:
    assert processor({}, tmp_path / "none", "x86_64").fast_bf16 is False


def test_a_cpu_has_the_name_that_linux_gives_it_or_that_of_its_kind(tmp_path: Path) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text(
        "processor\t: 0\nmodel name\t: Abacus 9000: fast\nprocessor\t: 1\nmodel name\t: Abacus 9000: fast\n"
    )
    assert cpu_name(told) == "Abacus 9000: fast"
    told.write_text("processor\t: 0\nCPU implementer\t: 0x41\n")
    assert cpu_name(told) == cpu_name(tmp_path / "none") != ""
