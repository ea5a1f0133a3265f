"""Holding every engine to one instruction set, so that they are compared on equal terms."""

from __future__ import annotations

import platform

INSTRUCTION_SETS = ("avx2", "avx512")

_LIMITS = {
    # What fuserve, torch, MKL and oneDNN each call it.
    "avx2": ("avx2", "avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "avx512", "AVX512", "AVX512_CORE_VNNI"),
}
_VARIABLES = (
    "FUSERVE_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
)

_AVX2 = ("AVX", "AVX2", "FMA", "F16C", "BMI2")
_AVX512 = (*_AVX2, "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16")


def limits(isa: str) -> dict[str, str]:
    """Environment of a process that uses no more than ``isa``; nothing for "native"."""
    return {} if isa == "native" else dict(zip(_VARIABLES, _LIMITS[isa], strict=True))


def ggml_options(isa: str) -> list[str]:
    """CMake options of a build of llama.cpp that uses no more than ``isa``."""
    if isa == "native":
        return ["-DGGML_NATIVE=ON"]
    features = _AVX2 if isa == "avx2" else _AVX512
    return ["-DGGML_NATIVE=OFF", *(f"-DGGML_{feature}=ON" for feature in features)]


def without_amx() -> str:
    """Compiler flags for llama.cpp: this release crashes in ggml_backend_amx_mul_mat."""
    is_x86 = platform.machine() == "x86_64"
    return "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" if is_x86 else ""
