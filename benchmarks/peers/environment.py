"""A peer's environment of its own, beside ours."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def install(python: Path, *packages: str) -> bool:
    """Make the environment that ``python`` belongs to, with packages; nothing if they fail."""
    folder = python.parent.parent
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if subprocess.run([*pip, *packages], check=False).returncode == 0:
        return True
    shutil.rmtree(folder)
    return False


def imports(python: Path, module: str) -> bool:
    """Whether ``python`` finds a module that works here."""
    probe = [str(python), "-c", f"import {module}"]
    return subprocess.run(probe, check=False, stdout=subprocess.DEVNULL).returncode == 0
