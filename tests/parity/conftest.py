"""What all comparisons with torch share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_oracle_thread() -> None:
    """torch on one thread: in some processes its first call with two was off by 1e-3.

    The logits of the second thread's tokens were, and those of the next call were not.
    """
    torch.set_num_threads(1)
