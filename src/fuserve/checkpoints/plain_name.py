"""Names within a folder, where a file that came from elsewhere gives them."""

from __future__ import annotations


def is_plain_name(name: object) -> bool:
    """Whether it can only be a file or a folder directly below the one that it is looked up in."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(separator in name for separator in ("/", "\\", ":", "\0"))
    )
