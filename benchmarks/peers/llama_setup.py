"""llama.cpp's Python package, built from source in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from instruction_sets import ggml_options, without_amx

LLAMA_CPP_PYTHON = "llama-cpp-python==0.3.36"
LEFT_OUT = (
    "-DLLAVA_BUILD=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
)


def llama_folder(cache: Path, isa: str) -> Path:
    """The environment of the build for ``isa``."""
    return cache if isa == "native" else cache.with_name(f"{cache.name}-{isa}")


def build_llama(python: Path, isa: str) -> None:
    """Make the environment of interpreter ``python`` and build llama-cpp-python in it.

    Raises:
        subprocess.CalledProcessError: it does not build here.
    """
    folder = python.parent.parent
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run(
        [str(python), "-m", "pip", "install", LLAMA_CPP_PYTHON, "--no-binary", "llama-cpp-python"],
        check=True,
        env={
            **os.environ,
            "CMAKE_ARGS": " ".join([*ggml_options(isa), *LEFT_OUT]),
            "CFLAGS": without_amx(),
            "CXXFLAGS": without_amx(),
        },
    )
