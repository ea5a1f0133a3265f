"""Write core.txt, serve.txt, image.txt and dev.txt: the exact versions that this environment holds.

Run it by ``make lock`` after a dependency in pyproject.toml has changed and been installed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent


def closure(roots: Iterable[str]) -> dict[str, str]:
    """Installed versions of the roots and of everything they need, by name."""
    versions: dict[str, str] = {}
    todo = [Requirement(root) for root in roots]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        found = distribution(name)
        versions[name] = found.version.split("+")[0]
        for line in found.requires or []:
            needed = Requirement(line)
            extras = ["", *wanted.extras]
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                todo.append(needed)
    return versions


def write(name: str, heading: str, versions: dict[str, str]) -> None:
    """Write one requirements file."""
    lines = [f"{package}=={version}" for package, version in sorted(versions.items())]
    (HERE / name).write_text("\n".join([heading, *lines, ""]))


def main() -> None:
    """Lock the core and the developer's environment."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    core = closure(project["dependencies"])
    serve = without(closure(extras["serve"]), core)
    image = without(closure(extras["image"]), core)
    dev = without(closure(extras["dev"]), core | serve)
    write("core.txt", "# What the core needs, pinned; written by `make lock`.", core)
    write(
        "serve.txt",
        "# What `fuserve serve` needs beside it, pinned; written by `make lock`.\n-r core.txt",
        serve,
    )
    write(
        "image.txt",
        "# What pictures in files need beside it, pinned; written by `make lock`.\n-r core.txt",
        image,
    )
    write(
        "dev.txt", "# Oracles, tests and tools, pinned; written by `make lock`.\n-r serve.txt", dev
    )


def without(versions: dict[str, str], those: dict[str, str]) -> dict[str, str]:
    """The versions but those."""
    return {name: version for name, version in versions.items() if name not in those}


if __name__ == "__main__":
    main()
