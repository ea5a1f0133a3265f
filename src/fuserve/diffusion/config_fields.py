"""What several readers of diffusers configs ask of a field."""

from __future__ import annotations

from fuserve.architectures.fields import Fields

MAX_CHANNELS = 1 << 14
MAX_BLOCKS = 16
MAX_LAYERS = 256
MAX_GROUPS = 1 << 10


def require(fields: Fields, name: str, *supported: object) -> None:
    """Refuse a field that is there and has another value than one of these."""
    value = fields.get(name)
    if value is None or any(type(value) is type(one) and value == one for one in supported):
        return
    also = "".join(f", or {one!r}" for one in supported)
    fields.refuse(
        name,
        f"the field absent or null{also}. fuserve does not compute what this value asks for; use a "
        "checkpoint without it, or run the model with diffusers",
    )


def texts(fields: Fields, name: str, default: tuple[str, ...]) -> tuple[str, ...]:
    """A list of at most ``MAX_BLOCKS`` strings."""
    value = fields.get(name)
    if value is None:
        return default
    is_list = isinstance(value, list | tuple) and 1 <= len(value) <= MAX_BLOCKS
    if not is_list or not all(isinstance(one, str) for one in value):
        fields.refuse(name, f"a list of 1 to {MAX_BLOCKS} names")
    return tuple(value)


def sizes(fields: Fields, name: str, default: tuple[int, ...], *, high: int) -> tuple[int, ...]:
    """A list of at most ``MAX_BLOCKS`` integers from 1 to ``high``."""
    value = fields.get(name)
    if value is None:
        return default
    is_list = isinstance(value, list | tuple) and 1 <= len(value) <= MAX_BLOCKS
    if not is_list or not all(type(one) is int and 1 <= one <= high for one in value):
        fields.refuse(name, f"a list of 1 to {MAX_BLOCKS} integers from 1 to {high}")
    return tuple(value)


def per_block(
    fields: Fields, name: str, count: int, default: int | None = None, *, high: int
) -> tuple[int, ...]:
    """One integer for all ``count`` blocks, or a list with one for each."""
    if not isinstance(fields.get(name), list | tuple):
        return (fields.integer(name, default, high=high),) * count
    values = sizes(fields, name, (), high=high)
    if len(values) != count:
        fields.refuse(name, f"an integer, or a list of {count}, one for each block")
    return values
