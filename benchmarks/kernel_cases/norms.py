"""Norms beside torch's, on one thread, as each thread of a step runs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fuserve import _native
from fuserve._native import Norm
from fuserve.kernels.machine import measure_bandwidth, selected_isa

from .measure import Effort, Row, in_turns, num_copies
from .torch_peers import norm_peer

EPS = 1e-5
SIZES = (576, 2048)
TOKENS = (1, 512)


def measure_norms(effort: Effort, quick: bool) -> Iterator[Row]:
    """One row that lies in the cache, as in decoding; many that come from memory.

    The rate counts what is read and what is written. No ceiling applies to the cached row.
    """
    effort = replace(effort, threads=1)
    bandwidth = measure_bandwidth(1)
    for size in SIZES[-1:] if quick else SIZES:
        for layer in (False, True):
            for tokens in TOKENS:
                yield _measure(layer, size, tokens, bandwidth, effort)


def _measure(layer: bool, size: int, tokens: int, bandwidth: float, effort: Effort) -> Row:
    isa = selected_isa()
    weight = np.ones(size, np.float32)
    norm = Norm(layer, EPS, weight, np.zeros(size, np.float32) if layer else None)
    one = np.random.default_rng(size).standard_normal((tokens, size), np.float32)
    copies = num_copies(one.nbytes) if tokens > 1 else 1
    inputs = [one.copy() for _ in range(copies)]
    out = np.empty_like(one)
    peer, torch_norm = norm_peer(layer, inputs, weight, EPS)
    seconds = in_turns(
        {
            "fuserve": (lambda copy: _native.normalize(isa, norm, inputs[copy], out), copies),
            peer: (torch_norm, copies),
        },
        effort,
    )
    return Row(
        f"{'layer' if layer else 'rms'} norm, 1 thread",
        f"{size}",
        f"M={tokens}",
        seconds["fuserve"],
        2 * one.nbytes / seconds["fuserve"] / 1e9,
        "GB/s",
        "memory" if copies > 1 else "",
        bandwidth / 1e9 if copies > 1 else None,
        peer,
        seconds[peer],
    )
