"""llama.cpp's own server, built for this machine from the source that llama-cpp-python brings."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from instruction_sets import without_amx

OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


def prepare(binary: Path, release: str) -> Path:
    """Build the server unless it is there.

    Args:
        binary: where it shall lie.
        release: the requirement of llama-cpp-python whose source is built.
    """
    if binary.exists():
        return binary
    print("building llama.cpp's server for this machine: about ten minutes", file=sys.stderr)
    binary.parent.mkdir(parents=True, exist_ok=True)
    tools = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        source_only = ["--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python"]
        _run([*pip, *source_only, "--dest", folder, release])
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (source,) = Path(folder).glob("*/vendor/llama.cpp")
        build = Path(folder) / "build"
        ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"]
        cmake = str(tools / "cmake")
        flags_of = [f"-DCMAKE_{language}_FLAGS={without_amx()}" for language in ("C", "CXX")]
        _run([cmake, "-S", str(source), "-B", str(build), *ninja, *OPTIONS, *flags_of])
        _run([cmake, "--build", str(build), "--target", "llama-server", "--parallel"])
        shutil.copy2(build / "bin" / "llama-server", binary)
    return binary


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)
