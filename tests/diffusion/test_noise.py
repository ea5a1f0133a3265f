"""A seed gives the noise that torch's CPU generator gives, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fuserve.diffusion.noise import NoiseGenerator, image_noise
from fuserve.errors import InvalidRequestError

# Without AVX2 torch takes sine and logarithm from the C library, with AVX-512 from elsewhere.
TOLERANCE = 0.0 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 4e-6
SEEDS = [0, 1, 7, 42, 2**31, 2**32 - 1, 2**32 + 5, 123456789012345, 2**64 - 1, -1, -(2**63)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_gives_torchs_bits(seed: int) -> None:
    expected = torch.randn((4, 64, 64), generator=torch.Generator().manual_seed(seed)).numpy()
    drawn = NoiseGenerator(seed).normal((4, 64, 64))
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 31, 32, 33, 48, 100, 4095])
def test_draws_of_any_size_follow_each_other_as_in_torch(count: int) -> None:
    theirs = torch.Generator().manual_seed(11)
    ours = NoiseGenerator(11)
    for size in (count, 3, count, 64, count):  # single numbers come in pairs that outlive a draw
        expected = torch.randn(size, generator=theirs).numpy()
        drawn = ours.normal((size,))
        if size < 16:  # float64 there: the libraries' sines may differ in the last bit of 53
            np.testing.assert_allclose(drawn, expected, rtol=1e-6, atol=1e-12)
        else:
            np.testing.assert_allclose(drawn, expected, rtol=0, atol=TOLERANCE)


def test_millions_of_numbers_are_torchs() -> None:
    expected = torch.randn(1 << 21, generator=torch.Generator().manual_seed(3)).numpy()
    drawn = NoiseGenerator(3).normal((1 << 21,))
    assert float(np.abs(drawn - expected).max()) <= TOLERANCE


def test_each_image_has_its_own_noise_whatever_stands_beside_it() -> None:
    alone = [image_noise([NoiseGenerator(seed)], 9, 7, 4) for seed in (5, 6)]
    together = image_noise([NoiseGenerator(5), NoiseGenerator(6)], 9, 7, 4)
    np.testing.assert_array_equal(together, np.concatenate(alone))
    expected = torch.randn((1, 4, 9, 7), generator=torch.Generator().manual_seed(5))
    wanted = expected.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(alone[0], wanted, rtol=0, atol=TOLERANCE)


def test_a_seed_of_more_than_64_bits_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="64-bit"):
        NoiseGenerator(2**64)
