"""What a quantization remembers on disk, so that it can go on where it was interrupted.

``state.json`` names the next layer and a digest of all that decides the result; beside it lie the
hidden states that enter this layer, mapped into memory while they are used.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fuserve.errors import InvalidRequestError

Floats = npt.NDArray[np.float32]

FOLDER = ".unfinished"
STATE = "state.json"


class ProgressFile:
    """The state of one quantization.

    Args:
        output: the folder that is written.
        digest: of model, recipes, options and text.

    Raises:
        InvalidRequestError: the folder holds something else.
    """

    def __init__(self, output: Path, digest: str) -> None:
        self._folder = output / FOLDER
        self._digest = digest
        self.next_layer = 0
        state = self._read()
        if state is None and output.exists() and any(output.iterdir()):
            raise InvalidRequestError(f"{output}: is not empty; choose a new folder.")
        if state is not None and state.get("digest") != digest:
            raise InvalidRequestError(
                f"{output}: holds an unfinished quantization of another model, scheme or text; "
                "remove it, or choose a new folder."
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        if state is None:
            self._save()  # at once, so that the folder is known for what it is from the beginning
        else:
            self.next_layer = int(state["next_layer"])

    def hidden(self, layer: int, shape: tuple[int, ...]) -> Floats:
        """New memory for the hidden states that enter ``layer``."""
        path = self._hidden_path(layer)
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)

    def saved_hidden(self) -> Floats:
        """The hidden states that enter the next layer."""
        saved: Floats = np.load(self._hidden_path(self.next_layer), mmap_mode="r")
        return saved

    def advance(self, layer: int) -> None:
        """All up to ``layer`` is done, and its hidden states are written."""
        self.next_layer = layer
        self._save()
        for path in self._folder.glob("hidden-*.npy"):
            if path != self._hidden_path(layer):
                path.unlink()

    def finish(self) -> None:
        """Forget it all: the output is complete."""
        shutil.rmtree(self._folder)

    def _save(self) -> None:
        unfinished = self._folder / f".{STATE}"
        state = {"digest": self._digest, "next_layer": self.next_layer}
        unfinished.write_text(json.dumps(state))
        os.replace(unfinished, self._folder / STATE)

    def _hidden_path(self, layer: int) -> Path:
        return self._folder / f"hidden-{layer}.npy"

    def _read(self) -> dict[str, Any] | None:
        try:
            state = json.loads((self._folder / STATE).read_text())
        except (OSError, ValueError):
            return None
        return state if isinstance(state, dict) else None
