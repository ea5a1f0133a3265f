"""Mixed schemes: which recipe each linear layer gets, by patterns of names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fuserve.errors import InvalidRequestError
from fuserve.quantization.scheme import RECIPES, Recipe, recipe_named

KEEP = "keep"
"""What the command line calls a layer that stays as it is."""

_SHORTER = (("model.", ""), ("self_attn.", ""), ("mlp.", ""), ("lm_head", "head"), ("_proj", ""))


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The recipe of each linear layer.

    Attributes:
        default: of layers that no pattern matches.
        overrides: (pattern, recipe), the first that matches wins; None keeps the layer as it is.
            Patterns are of canonical names, ``layers.1.down``, with ``*`` and ``?``.
    """

    default: Recipe | None
    overrides: tuple[tuple[str, Recipe | None], ...] = (("head", None), ("embedding", None))

    @classmethod
    def parse(
        cls,
        default: Recipe | None,
        overrides: Sequence[str],
        recipes: Mapping[str, Recipe] = RECIPES,
    ) -> LayerChoice:
        """A choice from the command line's ``PATTERN=SCHEME``, such as ``layers.1.down=int8``.

        A group size may follow: ``layers.1.down=int8:64``.

        Hugging Face's names work as well: ``model.layers.1.mlp.down_proj=int8``,
        ``lm_head=keep``. Embedding and head are kept as they are unless a pattern names them.

        Raises:
            InvalidRequestError: an override is no such pair, or its scheme does not exist.
        """
        parsed: list[tuple[str, Recipe | None]] = []
        for text in overrides:
            pattern, equals, name = text.partition("=")
            if not equals or not pattern or not name:
                raise InvalidRequestError(
                    f"{text!r} is no PATTERN=SCHEME; write it like layers.1.down=int8"
                )
            parsed.append((canonical_pattern(pattern), _recipe(name, recipes)))
        return cls(default, (*parsed, *cls(default).overrides))

    def recipe_of(self, name: str) -> Recipe | None:
        """The recipe of canonical linear layer ``name``; None keeps it as it is."""
        for pattern, recipe in self.overrides:
            if fnmatchcase(name, pattern):
                return recipe
        return self.default

    def check_patterns(self, names: Collection[str]) -> None:
        """Check that each pattern, the usual ones aside, is of a layer that there is.

        Raises:
            InvalidRequestError: a pattern matches none of these names.
        """
        usual = LayerChoice(None).overrides
        for pattern, recipe in self.overrides:
            if (pattern, recipe) not in usual and not any(fnmatchcase(n, pattern) for n in names):
                example = f"; one is called {next(iter(names))!r}" if names else ""
                raise InvalidRequestError(
                    f"{pattern!r} matches no layer that can be quantized{example}"
                )

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """All recipes that may be needed."""
        chosen = (self.default, *(recipe for _, recipe in self.overrides))
        return tuple(recipe for recipe in chosen if recipe is not None)


def _recipe(text: str, recipes: Mapping[str, Recipe]) -> Recipe | None:
    name, colon, group_size = text.partition(":")
    if text == KEEP:
        return None
    if colon and not group_size.isdecimal():
        raise InvalidRequestError(f"{text!r} has no group size after the colon, such as int8:64")
    return recipe_named(name, int(group_size) if colon else None, recipes=recipes)


def canonical_pattern(pattern: str) -> str:
    """A pattern of canonical names from one that may be of Hugging Face's names."""
    for long, short in _SHORTER:
        pattern = pattern.replace(long, short)
    return pattern
