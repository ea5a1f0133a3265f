"""OpenVINO GenAI's environment and the model folders it reads, made once where it installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from environment import imports, install

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parents[1] / ".cache" / "peers-openvino"
# torch only converts models here; its CPU build is enough.
PACKAGES = (
    "openvino-genai==2026.4.1.0",
    "optimum-intel==2.2.0",
    "nncf==3.4.0",
    "torch==2.13.0",
)


def prepare(python: Path, folders: list[Path], configs: Path) -> set[Path]:
    """Make the environment and the model folders, named ``<config>-<int4 or int8>``.

    Returns: the folders that are there now.
    """
    if not make_environment(python):
        return set()
    ready = set()
    for folder in folders:
        config_name, _, weights = folder.name.rpartition("-")
        if make_model(python, configs / f"{config_name}.json", folder, weights):
            ready.add(folder)
    return ready


def make_environment(python: Path) -> bool:
    """Create the environment that ``python`` belongs to; whether OpenVINO GenAI is there."""
    if not python.exists():
        print("installing OpenVINO GenAI: about a minute", file=sys.stderr)
        if not install(python, *PACKAGES):
            return False
        # optimum-intel asks for torchvision, whose build may not match torch's; text needs none.
        uninstall = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"]
        subprocess.run(uninstall, check=True)
    return imports(python, "openvino_genai")


def make_model(python: Path, config: Path, folder: Path, weights: str) -> bool:
    """Write the IR of a config's random weights, ``int4`` or ``int8``, unless it is there."""
    if folder.exists():
        return True
    print(f"writing {folder.name}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    command = [str(python), str(HERE / "openvino_export.py"), str(config), str(part), weights]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        return False
    part.rename(folder)
    return True
