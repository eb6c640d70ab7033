"""What this machine's CPU is fast at: half precision or only float32, as far as oneDNN may use it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")

# oneDNN computes vLLM's linear layers, and reads one of these when it is first used. A name below is a level without
# fast bfloat16: AVX512_CORE and AVX512_CORE_VNNI emulate it, AVX2_VNNI_2 only converts it.
_ONEDNN_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_BELOW_AVX512 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"}
_BELOW_BF16 = _BELOW_AVX512 | {"AVX512_CORE", "AVX512_CORE_VNNI"}
_BELOW_FP16 = _BELOW_BF16 | {"AVX512_CORE_BF16"}

_X86 = {"x86_64", "amd64"}
_ARM = {"aarch64", "arm64"}
_X86_BF16 = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
_X86_FP16 = {"avx512_fp16", "amx_fp16"}


@dataclass(frozen=True, slots=True)
class Processor:
    """A CPU as the kernels may use it."""

    fast_bf16: bool | None
    """Whether it multiplies bfloat16 matrices in hardware; None: another architecture than x86-64 and Arm."""
    fast_fp16: bool | None
    """The same of float16."""
    avx512: bool
    reason: str
    """Why `fast_bf16` is what it is, e.g. `the processor has AVX512-BF16`."""


def processor(
    environment: Mapping[str, str] = os.environ, cpu_info: Path = _CPU_INFO, architecture: str | None = None
) -> Processor:
    """The CPU of this machine, below the limit that `ONEDNN_MAX_CPU_ISA` sets.

    What Linux says of the processor, and no more: neither torch nor vLLM is imported, so that a plan decides as the
    engine does. torch's own `torch.cpu._is_avx512_bf16_supported` does not know of the limit.

    Args:
        environment: variables of the process that computes.
        cpu_info: as Linux writes it.
        architecture: as `platform.machine` names it; default: this machine's.
    """
    machine = (architecture or platform.machine()).lower()
    if machine in _X86:
        return _x86(set(_told_of_cpu("flags", cpu_info).split()), environment)
    if machine in _ARM:
        features = _told_of_cpu("Features", cpu_info).split()
        has = "bf16" in features
        reason = f"the processor has {'' if has else 'no '}Arm bf16 instructions"
        return Processor(has, fast_fp16="asimdhp" in features, avx512=False, reason=reason)
    return Processor(None, None, avx512=False, reason=f"nothing is known of bfloat16 on {machine}")


def _x86(flags: set[str], environment: Mapping[str, str]) -> Processor:
    limits = ((name, environment[name].upper()) for name in _ONEDNN_VARIABLES if environment.get(name))
    variable, level = next(limits, ("", ""))
    avx512 = "avx512f" in flags and level not in _BELOW_AVX512
    fp16 = bool(flags & _X86_FP16) and level not in _BELOW_FP16
    found = " and ".join(told for flag, told in _X86_BF16.items() if flag in flags)
    if not found:
        return Processor(False, fp16, avx512, "the processor has neither AVX512-BF16 nor AMX-BF16")
    if level in _BELOW_BF16:
        return Processor(False, fp16, avx512, f"{variable}={level} keeps oneDNN from the processor's {found}")
    return Processor(True, fp16, avx512, f"the processor has {found}")


def cpu_name(cpu_info: Path = _CPU_INFO) -> str:
    """The model of this machine's CPU, as Linux names it; its architecture where Linux does not."""
    return _told_of_cpu("model name", cpu_info) or platform.machine()


def _told_of_cpu(field: str, cpu_info: Path) -> str:
    """What the first line of this name says; cores are taken to be alike. Empty where there is none."""
    text = cpu_info.read_text(errors="replace") if cpu_info.is_file() else ""
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == field), "")
