"""What is remembered of a layer's inputs during calibration."""

from __future__ import annotations

import numpy as np
import pytest

from fuserve.quantization.statistics import InputObserver


@pytest.mark.parametrize(
    ("height", "width", "times", "sample_rows"), [(16, 16, 160, 256), (64, 64, 160, 256)]
)
def test_the_sample_of_images_is_from_all_over_them_and_of_all_times(
    height: int, width: int, times: int, sample_rows: int
) -> None:
    y, x = np.indices((height, width), np.float32).reshape(2, -1)
    observer = InputObserver(3, times * x.size, with_hessian=False, sample_rows=sample_rows)
    for time in range(times):
        observer.add(np.stack([np.full_like(x, time), y, x], axis=1))
    sample = observer.result().sample
    assert 0.7 * sample_rows <= len(sample) <= 1.5 * sample_rows
    for column, count in zip(sample.T, (times, height, width), strict=True):
        values, each = np.unique(column, return_counts=True)
        assert len(values) >= count / 2
        assert each.max() <= 3 * len(sample) / count


def test_the_sample_of_windows_is_of_all_places_in_them() -> None:
    """The defaults of ``fuserve quantize``: 128 windows of 256 tokens."""
    observer = InputObserver(1, 128 * 256, with_hessian=False)
    for _ in range(16):
        observer.add(np.tile(np.arange(256, dtype=np.float32), 8)[:, None])
    places = observer.result().sample[:, 0]
    assert len(np.unique(places)) == 256
