"""Measure what an installation of a wheel and its dependencies takes on disk."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth")


def size_bytes(path: Path) -> int:
    """Sum of the sizes of the files under a path."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def installed_sizes(python: Path) -> dict[str, int]:
    """Bytes of each package of an environment, by name."""
    (site_packages,) = python.parent.parent.glob("lib/python*/site-packages")
    return {
        entry.name: size_bytes(entry)
        for entry in site_packages.iterdir()
        if entry.name.split("-")[0] not in NOT_OURS and entry.name not in NOT_OURS
    }


def report(what: str, sizes: dict[str, int], limit_mb: float) -> bool:
    """Print the largest parts and the sum; return whether it is within the limit."""
    total_mb = sum(sizes.values()) / 1e6
    for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:10]:
        print(f"{size / 1e6:8.1f} MB  {name}")
    print(f"{total_mb:8.1f} MB  {what}, limit {limit_mb:.0f} MB")
    return total_mb < limit_mb


def main() -> int:
    """Install into a fresh environment, print the largest parts, compare with the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--limit-mb", type=float, required=True, help="of the core")
    parser.add_argument("--serve-limit-mb", type=float, required=True, help="with the server")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*install, "-r", str(ROOT / "requirements/core.txt")], check=True)
        # With dependencies: what the wheel needs beyond the locked core counts too.
        subprocess.run([*install, str(arguments.wheel)], check=True)
        core = installed_sizes(python)
        subprocess.run([*install, "-r", str(ROOT / "requirements/serve.txt")], check=True)
        subprocess.run([*install, f"{arguments.wheel}[serve]"], check=True)
        serve = installed_sizes(python)
    core_fits = report("the core", core, arguments.limit_mb)
    serve_fits = report("the core and the server", serve, arguments.serve_limit_mb)
    return 0 if core_fits and serve_fits else 1


if __name__ == "__main__":
    sys.exit(main())
