"""Fixed scales for the inputs of a UNet's convolutions: of their largest values in one step.

In a process of its own, so that the float network that it runs counts for nobody's memory. Takes an
image worker's arguments; ``--save`` is a JSON file, by the names of weights.
"""

from __future__ import annotations

import json
from collections.abc import Collection

import numpy as np
from fuserve_image_worker import Fuserve
from image_worker import Array, parse_work

from fuserve.diffusion.native import NativeProgram
from fuserve.diffusion.program import Conv, Linear, Program
from fuserve.diffusion.stepwise import StepwiseExecutor


class _Maker:
    """Makes executors that share the engine's weights."""

    def __init__(self, engine: Fuserve) -> None:
        self._engine = engine

    def __call__(self, program: Program) -> NativeProgram:
        return self._engine.ready(program)

    def forget(self, names: Collection[str]) -> None:
        """Nothing is added."""


def main() -> None:
    """Run one step of the float network and write the scales."""
    work = parse_work()
    engine = Fuserve(work)
    scales: dict[str, float] = {}

    def tap(op: Conv | Linear, x: Array) -> Array:
        if isinstance(op, Conv):
            scales[op.weight[0]] = float(np.abs(x).max()) / 127
        return x

    StepwiseExecutor(engine.program.program, _Maker(engine), tap).run(engine.inputs)
    work.save.write_text(json.dumps(scales, indent=1) + "\n")


if __name__ == "__main__":
    main()
