"""Quantities with units, as people write them in options."""

from __future__ import annotations

import re

from fuserve.errors import InvalidRequestError

_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def parse_bytes(option: str, text: str) -> int:
    """``16GB`` -> 16 000 000 000; units are decimal, ``GiB`` is binary.

    Raises:
        InvalidRequestError: it is no size.
    """
    match = _parsed(option, text, "([kKmMgGtT]?)(i?)[bB]?", "a size, such as 16GB")
    unit = match[2].lower()
    scale = 1 << 10 * "kmgt".index(unit) + 10 if match[3] and unit else _PREFIXES[unit]
    return round(float(match[1]) * scale)


def parse_rate(option: str, text: str) -> float:
    """``10Gbit/s`` or ``1.25GB/s`` -> bytes a second.

    Raises:
        InvalidRequestError: it is no rate.
    """
    match = _parsed(
        option, text, "([kKmMgGtT]?)(bit|bps|B)(/s|ps)?", "a rate, such as 10Gbit/s or 1.25GB/s"
    )
    return float(match[1]) * _PREFIXES[match[2].lower()] / (1 if match[3] == "B" else 8)


def parse_seconds(option: str, text: str) -> float:
    """``50us`` -> 5e-5.

    Raises:
        InvalidRequestError: it is no time.
    """
    match = _parsed(option, text, "(s|ms|us|ns)", "a time, such as 50us")
    return float(match[1]) * _SECONDS[match[2]]


def _parsed(option: str, text: str, unit: str, what: str) -> re.Match[str]:
    """A positive number, and behind it what the expression says."""
    match = re.fullmatch(rf"\s*(\d+\.?\d*|\.\d+)\s*{unit}\s*", text)
    if match is None or float(match[1]) == 0:
        raise InvalidRequestError(f"{option} is {text!r}; it must be {what}.")
    return match
