"""Write core.txt and dev.txt: the exact versions that this environment holds.

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
    core = closure(project["dependencies"])
    dev = closure(project["optional-dependencies"]["dev"])
    extra = {name: version for name, version in dev.items() if name not in core}
    write("core.txt", "# What the core needs, pinned; written by `make lock`.", core)
    write(
        "dev.txt",
        "# Oracles, tests and tools, pinned; written by `make lock`.\n-r core.txt",
        extra,
    )


if __name__ == "__main__":
    main()
