"""What a rank is told when it starts, as JSON goes between processes and hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fuserve.decoder.options import ExecutorOptions
from fuserve.parallel.layout import GroupLayout
from fuserve.parallel.slots import SlotSizes


@dataclass(frozen=True, slots=True)
class Assignment:
    """What all ranks of a group must know alike.

    Attributes:
        model: as rank 0's user has named it.
        options: formats, sizes and threads; the type of the KV cache is decided.
        layout: who has which part.
        sizes: of what goes from stage to stage.
        step_timeout_s: how long to wait for another rank within a step.
    """

    model: str
    options: ExecutorOptions
    layout: GroupLayout
    sizes: SlotSizes
    step_timeout_s: float

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        stages = [[layers.start, layers.stop] for layers in self.layout.stage_layers]
        return {
            "model": self.model,
            "options": asdict(self.options),
            "tensor_size": self.layout.tensor_size,
            "stages": stages,
            "sizes": asdict(self.sizes),
            "step_timeout_s": self.step_timeout_s,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Assignment:
        """From plain values."""
        options = dict(values["options"])
        options["quantize_layers"] = tuple(options["quantize_layers"])
        stages = tuple(range(start, end) for start, end in values["stages"])
        return cls(
            model=values["model"],
            options=ExecutorOptions(**options),
            layout=GroupLayout(values["tensor_size"], stages),
            sizes=SlotSizes(**values["sizes"]),
            step_timeout_s=values["step_timeout_s"],
        )
