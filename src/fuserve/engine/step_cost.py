"""StepCost: how long a step will take, learned from the steps that have run."""

from __future__ import annotations

from dataclasses import dataclass

from fuserve.engine.linear_filter import LinearFilter


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step has to do.

    A prompt's chunk of a single token, a lone one, runs like a generating sequence's token; chunks
    of several tokens first make their context ready for all of them.

    Attributes:
        num_decode_tokens: tokens of sequences that are generating, drafts included.
        num_context_tokens: tokens that those attend to, summed.
        num_prefill_tokens: tokens of prompts, lone ones included.
        num_prefill_pairs: (token, attended token) pairs of the prompts' chunks but for lone tokens.
        num_prefill_reads: tokens before the prompts' chunks, summed over all but lone tokens.
        num_lone_tokens: lone tokens of prompts.
        num_lone_context: tokens that those attend to, summed.
    """

    num_decode_tokens: int = 0
    num_context_tokens: int = 0
    num_prefill_tokens: int = 0
    num_prefill_pairs: int = 0
    num_prefill_reads: int = 0
    num_lone_tokens: int = 0
    num_lone_context: int = 0


_NOISE = 0.05  # share by which equal steps differ
_NOISE_MS = 0.2
_REFRESH_STEPS = 32


class StepCost:
    """A linear model of a step's time, in milliseconds.

    Decoding costs so much a step, a token and a token of context; a chunk of a prompt costs so much
    a token, a pair that its attention goes through, and a token before it, which is read once
    however long the chunk is. The two parts are learned apart: steps that only decode teach the
    first, and what other steps take beyond it teaches the second. Learned together they could not
    be told apart, because how much of a prompt a step takes is decided from what decoding is
    believed to cost.
    """

    def __init__(self) -> None:
        # Priors in ms: a step, a token, a thousand tokens of context.
        self._decode = LinearFilter([50.0, 5.0, 5.0])
        # A token, a thousand pairs, a thousand tokens before the chunk.
        self._prefill = LinearFilter([5.0, 2.0, 5.0])
        self._seen_decode = False
        self._seen_prefill = False
        self._num_mixed = 0  # steps since one that only decoded

    @property
    def knows_mixed_steps(self) -> bool:
        """Whether decoding and prompts have both been measured."""
        return self._seen_decode and self._seen_prefill

    @property
    def wants_decode(self) -> bool:
        """Whether a step that only decodes ought to be measured, for lack of a recent one."""
        return self._num_mixed >= (_REFRESH_STEPS if self._seen_decode else 1)

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step that has run."""
        measured = seconds * 1e3
        noise = _NOISE * measured + _NOISE_MS
        num_together = load.num_prefill_tokens - load.num_lone_tokens
        if num_together == 0:
            self._decode.observe(_decode_features(load), measured, noise)
            self._seen_decode = True
            self._num_mixed = 0
            return
        beyond = measured - self.decode_seconds(load) * 1e3
        pairs, reads = load.num_prefill_pairs * 1e-3, load.num_prefill_reads * 1e-3
        self._prefill.observe((num_together, pairs, reads), beyond, noise)
        self._seen_prefill = True
        if load.num_decode_tokens > 0:
            self._num_mixed += 1

    def decode_seconds(self, load: StepLoad) -> float:
        """Of a step without the prompts' chunks of several tokens."""
        pairs = zip(self._decode.coefficients, _decode_features(load), strict=True)
        return sum(coefficient * feature for coefficient, feature in pairs) * 1e-3

    def chunk_seconds(self, start: int, num_tokens: int) -> float:
        """What so many prompt tokens from position ``start`` on add to a step."""
        if num_tokens == 1:
            return self._lone_ms(start) * 1e-3
        fixed, slope, curve = self._chunk_ms(start)
        return (fixed + (slope + curve * num_tokens) * num_tokens) * 1e-3

    def chunk_tokens(self, seconds: float, start: int) -> int:
        """Prompt tokens from position ``start`` on that add at most this time to a step."""
        fixed, slope, curve = self._chunk_ms(start)
        milliseconds = seconds * 1e3  # = fixed + slope * tokens + curve * tokens**2
        if milliseconds > fixed:
            root = (slope * slope + 4 * curve * (milliseconds - fixed)) ** 0.5
            num_tokens = int(2 * (milliseconds - fixed) / (slope + root))
            if num_tokens > 1:
                return num_tokens
        return int(0 < self._lone_ms(start) <= milliseconds)

    def _lone_ms(self, start: int) -> float:
        _, per_token, per_thousand_context = self._decode.coefficients
        return max(per_token + per_thousand_context * 1e-3 * start, 1e-4)

    def _chunk_ms(self, start: int) -> tuple[float, float, float]:
        """Milliseconds of n tokens are ``fixed + slope * n + curve * n**2``."""
        per_token, per_thousand_pairs, per_thousand_reads = self._prefill.coefficients
        per_pair = per_thousand_pairs * 1e-3
        fixed = per_thousand_reads * 1e-3 * start
        return fixed, max(per_token, 1e-4) + per_pair * start, per_pair / 2


def _decode_features(load: StepLoad) -> tuple[float, float, float]:
    num_tokens = load.num_decode_tokens + load.num_lone_tokens
    return 1.0, num_tokens, (load.num_context_tokens + load.num_lone_context) * 1e-3
