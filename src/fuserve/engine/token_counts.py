"""Which tokens a sequence has seen and how often it put them out, for the penalties."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


class TokenCounts:
    """Distinct token ids and their counts, as arrays that are updated in place."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        seen = sorted(set(prompt_ids))
        self._slots = {token: slot for slot, token in enumerate(seen)}
        self._ids = np.array(seen, dtype=np.int32)
        self._counts = np.zeros(len(seen), dtype=np.int32)

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """Distinct tokens of prompt and output  # [seen]"""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> npt.NDArray[np.int32]:
        """How often each was put out, 0 for those of the prompt alone  # [seen]"""
        return self._counts[: len(self._slots)]

    def add(self, token: int) -> None:
        """Count one more output token."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(max(64, slot), dtype=np.int32)])
            self._counts = np.concatenate([self._counts, np.zeros(max(64, slot), dtype=np.int32)])
        self._ids[slot] = token
        self._counts[slot] += 1
