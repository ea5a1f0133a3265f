"""What a rank is told when it starts, as JSON goes between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fuserve.diffusion.options import DiffusionOptions, LoraOption
from fuserve.parallel.images.options import ImageParallelOptions


@dataclass(frozen=True, slots=True)
class ImageAssignment:
    """What all ranks must know alike.

    Attributes:
        model: as rank 0's user has named it.
        options: of the model; ``num_threads`` is each rank's.
        parallel: who does what.
    """

    model: str
    options: DiffusionOptions
    parallel: ImageParallelOptions

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        options = asdict(self.options)
        for name in ("vae", "tokenizer"):
            options[name] = None if options[name] is None else str(options[name])
        options["loras"] = [[str(lora.path), lora.scale] for lora in self.options.loras]
        return {"model": self.model, "options": options, "parallel": asdict(self.parallel)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ImageAssignment:
        """From plain values."""
        options = dict(values["options"])
        options["loras"] = tuple(LoraOption(path, scale) for path, scale in options["loras"])
        return cls(
            values["model"], DiffusionOptions(**options), ImageParallelOptions(**values["parallel"])
        )
