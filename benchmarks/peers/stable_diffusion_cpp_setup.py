"""stable-diffusion.cpp's Python package, built from source in an environment of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from environment import imports, install

ENVIRONMENT = Path(__file__).resolve().parents[2] / ".cache" / "peers-stable-diffusion-cpp"
PACKAGE = "stable-diffusion-cpp-python==0.4.7"


def make_environment(python: Path) -> bool:
    """Create the environment that ``python`` belongs to; whether the package builds here."""
    if not python.exists():
        print("building stable-diffusion.cpp: about five minutes", file=sys.stderr)
        if not install(python, PACKAGE):
            return False
    return imports(python, "stable_diffusion_cpp")
