"""Checked access to the fields of a model's config, so that no value is trusted unseen."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from fuserve.errors import UnsupportedModelError

T = TypeVar("T")

MAX_VOCAB_SIZE = 1 << 24
MAX_HIDDEN_SIZE = 1 << 18
MAX_FEED_FORWARD_SIZE = 1 << 21
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 12
MAX_LAYERS = 1 << 11
MAX_POSITION = 1 << 28


class Fields:
    """One mapping of a config; every getter checks type and range.

    A field that is absent or null takes the default; without a default it is an error.

    Args:
        values: the mapping, such as config.json's content or GGUF metadata.
        where: path of this mapping in the config, for messages, such as ``rope_scaling``.
        prefix: put before every name, such as ``llama.`` for GGUF metadata.

    Raises:
        UnsupportedModelError: from every getter, naming the field, its value and what is
            supported.
    """

    __slots__ = ("_prefix", "_values", "_where")

    def __init__(self, values: Mapping[str, Any], *, where: str = "", prefix: str = "") -> None:
        self._values = values
        self._where = where
        self._prefix = prefix

    def get(self, name: str) -> Any:
        """The raw value, or None if absent."""
        return self._values.get(self._prefix + name)

    def refuse(self, name: str, supported: str) -> NoReturn:
        """Raise for field ``name``, saying what is supported instead of its value."""
        path = f"{self._where}.{name}" if self._where else self._prefix + name
        value = self.get(name)
        state = "is missing" if value is None else f"is {reprlib.repr(value)}"
        raise UnsupportedModelError(
            f"The model's config field {path!r} {state}. Needed: {supported}."
        )

    def integer(self, name: str, default: int | None = None, *, high: int, low: int = 1) -> int:
        """An integer in ``low..high``."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.refuse(name, f"an integer from {low} to {high}")
        return value

    def optional_integer(self, name: str, *, high: int, low: int = 1) -> int | None:
        """An integer in ``low..high``, or None if absent or null."""
        return None if self.get(name) is None else self.integer(name, low=low, high=high)

    def number(
        self, name: str, default: float | None = None, *, above: float = 0.0, high: float = 1e15
    ) -> float:
        """A finite number greater than ``above`` and at most ``high``."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # Compare before converting: float() of an absurdly large int overflows.
        if not is_number or not above < value <= high:
            self.refuse(name, f"a number above {above:g} and at most {high:g}")
        return float(value)

    def optional_number(self, name: str, *, above: float = 0.0, high: float = 1e15) -> float | None:
        """Like :meth:`number`, or None if absent or null."""
        return None if self.get(name) is None else self.number(name, above=above, high=high)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def choice(self, name: str, choices: Mapping[str, T], default: str | None = None) -> T:
        """The entry of ``choices`` that the field's string names."""
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, str) or value not in choices:
            self.refuse(name, "one of " + ", ".join(map(repr, choices)))
        return choices[value]

    def numbers(self, name: str, *, count: int) -> tuple[float, ...]:
        """A list of ``count`` positive finite numbers."""
        value = self.get(name)
        if not isinstance(value, (list, tuple)) or len(value) != count:
            self.refuse(name, f"a list of {count} numbers")
        for item in value:
            if not isinstance(item, (int, float)) or isinstance(item, bool) or not 0 < item <= 1e15:
                self.refuse(name, f"a list of {count} numbers above 0")
        return tuple(map(float, value))

    def nested(self, name: str) -> Fields | None:
        """The mapping in field ``name``, or None if absent, null or empty."""
        value = self.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            self.refuse(name, "a mapping")
        where = f"{self._where}.{name}" if self._where else self._prefix + name
        return Fields(value, where=where)

    def with_defaults(self, defaults: Mapping[str, Any]) -> Fields:
        """These fields, those absent or null filled up from ``defaults``."""
        present = {name: value for name, value in self._values.items() if value is not None}
        return Fields({**defaults, **present}, where=self._where, prefix=self._prefix)

    def require_off(self, *names: str) -> None:
        """Refuse fields that switch on something fuserve does not compute."""
        for name in names:
            if self.get(name) not in (None, False):
                self.refuse(name, "the field absent, null or false")


def head_dim_of(fields: Fields, name: str, hidden_size: int, num_heads: int) -> int:
    """Field ``name``, or ``hidden_size / num_heads`` if that is whole."""
    if fields.get(name) is None and hidden_size % num_heads:
        fields.refuse(
            name, f"a head size, as hidden size {hidden_size} is no multiple of {num_heads} heads"
        )
    return fields.integer(name, hidden_size // num_heads or None, high=MAX_HEAD_DIM)


def kv_heads_of(fields: Fields, name: str, num_heads: int) -> int:
    """Field ``name`` (by default ``num_heads``), which must divide ``num_heads``."""
    num_kv_heads = fields.integer(name, num_heads, high=MAX_HEADS)
    if num_heads % num_kv_heads:
        fields.refuse(name, f"a divisor of the {num_heads} attention heads")
    return num_kv_heads


def inverse_sqrt(value: float) -> float:
    """``value ** -0.5``."""
    return 1.0 / math.sqrt(value)
