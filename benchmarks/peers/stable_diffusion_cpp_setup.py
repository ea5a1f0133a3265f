"""stable-diffusion.cpp's Python package, built from source in an environment of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = Path(__file__).resolve().parents[2] / ".cache" / "peers-stable-diffusion-cpp"
PACKAGE = "stable-diffusion-cpp-python==0.4.7"


def make_environment(python: Path) -> bool:
    """Create the environment that ``python`` belongs to; whether the package builds here."""
    if not python.exists():
        print("building stable-diffusion.cpp: about five minutes", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        if subprocess.run([*pip, PACKAGE], check=False).returncode != 0:
            shutil.rmtree(python.parent.parent)
            return False
    probe = [str(python), "-c", "import stable_diffusion_cpp"]
    return subprocess.run(probe, check=False, stdout=subprocess.DEVNULL).returncode == 0
