"""Memory that this process may use."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that can still be taken: what the machine has free, within the cgroup's limit."""
    free = int(psutil.virtual_memory().available)
    limit = _read_number(CGROUP_ROOT / "memory.max")
    used = _read_number(CGROUP_ROOT / "memory.current")
    if limit is None:
        limit = _read_number(CGROUP_ROOT / "memory" / "memory.limit_in_bytes")
        used = _read_number(CGROUP_ROOT / "memory" / "memory.usage_in_bytes")
    if limit is None or used is None:
        return free
    return max(0, min(free, limit - used))


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
