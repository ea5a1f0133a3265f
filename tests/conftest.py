"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def packed_weights_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps packed weights of the tests out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    patch.setenv("FUSERVE_CACHE", str(folder))
    return folder


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """For models so small that waking torch's threads takes longer than a layer."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def prose() -> str:
    """About 2400 tokens of English."""
    return (Path(__file__).parent / "data" / "prose.txt").read_text()
