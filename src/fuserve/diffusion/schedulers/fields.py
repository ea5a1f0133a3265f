"""Reading a ``scheduler_config.json``: each field with its default, checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fuserve.errors import UnsupportedModelError


class SchedulerFields:
    """The fields of a scheduler's config, as diffusers writes it.

    A field that is absent, or null, takes the default of the class that reads it, as in diffusers:
    so a config written for one scheduler can be read by another.

    Args:
        config: the JSON object.
        reader: the scheduler that reads it, for error messages.
    """

    def __init__(self, config: Mapping[str, Any], reader: str) -> None:
        self._config = config
        self._reader = reader

    def with_defaults(self, **defaults: Any) -> SchedulerFields:
        """The same fields, where those that are absent have other defaults."""
        given = {name: value for name, value in self._config.items() if value is not None}
        return SchedulerFields({**defaults, **given}, self._reader)

    def number(self, name: str, default: float) -> float:
        """A number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.unsupported(name, "a number")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A number, or None where the field is absent."""
        return None if self._config.get(name) is None else self.number(name, 0.0)

    def integer(self, name: str, default: int, *, minimum: int = 0) -> int:
        """An integer of at least ``minimum``."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.unsupported(name, f"an integer of at least {minimum}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A truth value."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.unsupported(name, "true or false")
        return value

    def choice(self, name: str, default: str, allowed: Sequence[str]) -> str:
        """One of some strings."""
        value = self._value(name, default)
        if value not in allowed:
            raise self.unsupported(name, " or ".join(repr(one) for one in allowed))
        return str(value)

    def numbers(self, name: str) -> list[float] | None:
        """A list of numbers, or None where the field is absent."""
        value = self._config.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(
            isinstance(one, int | float) and not isinstance(one, bool) for one in value
        ):
            raise self.unsupported(name, "a list of numbers")
        return [float(one) for one in value]

    def refuse(self, *names: str) -> None:
        """Fields that ask for something this scheduler does not do.

        Raises:
            UnsupportedModelError: one of them is set.
        """
        for name in names:
            if self._config.get(name) not in (None, False):
                raise self.unsupported(name, "absent or false")

    def unsupported(self, name: str, wanted: str) -> UnsupportedModelError:
        """The error for a field's value."""
        return UnsupportedModelError(
            f"scheduler_config.json: {name}={self._config.get(name)!r} is not supported by "
            f"{self._reader}; it takes {wanted}. Another scheduler can be chosen by name."
        )

    def _value(self, name: str, default: Any) -> Any:
        value = self._config.get(name)
        return default if value is None else value
