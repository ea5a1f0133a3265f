"""The native sampler against a plain float64 statement of what it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fuserve.kernels.sampling import SampleStatus, greedy_token, sample_token, score_token

Row = npt.NDArray[np.float32]
VOCAB_SIZES = (1, 7, 97, 49152)


def random_row(vocab: int, scale: float = 3.0, seed: int = 0) -> Row:
    return (np.random.default_rng(seed).standard_normal(vocab) * scale).astype(np.float32)


def stated_distribution(
    logits: Row,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seen: dict[int, int] | None = None,
    bias: dict[int, float] | None = None,
) -> npt.NDArray[np.float64]:
    """Probabilities by sorting everything in float64."""
    x: npt.NDArray[np.float64] = logits.astype(np.float64)
    for token, shift in (bias or {}).items():
        x[token] += shift
    for token, count in (seen or {}).items():
        x[token] = x[token] / repetition_penalty if x[token] > 0 else x[token] * repetition_penalty
        x[token] -= frequency_penalty * count + presence_penalty * (count > 0)
    p: npt.NDArray[np.float64] = np.exp((x - x.max()) / temperature)
    p[p < min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[(before >= top_p) & (before > 0)]] = 0
    p /= p.sum()
    return p


def native_arguments(options: dict[str, Any]) -> dict[str, Any]:
    arguments = {k: v for k, v in options.items() if k not in ("seen", "bias")}
    for name, values, dtype in (("seen", "seen_counts", np.int32), ("bias", "bias_values", "f4")):
        if name in options:
            arguments[f"{name}_ids"] = np.array(list(options[name]), dtype=np.int32)
            arguments[values] = np.array(list(options[name].values()), dtype=dtype)
    return arguments


def swept_distribution(logits: Row, num_draws: int, options: dict[str, Any]) -> Row:
    """Frequencies of the tokens over evenly spaced draws."""
    arguments = native_arguments(options)
    draws = (np.arange(num_draws) + 0.5) / num_draws
    tokens = [sample_token(logits, float(u), **arguments).token for u in draws]
    return (np.bincount(tokens, minlength=len(logits)) / num_draws).astype(np.float32)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 7.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 40, "temperature": 1.5},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 5, "top_p": 0.8},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.02, "temperature": 1.3},
    {"top_p": 0.9, "min_p": 0.05},
    {"seen": {0: 3}, "repetition_penalty": 2.0},
    {"seen": {0: 0}, "presence_penalty": 2.0, "frequency_penalty": 1.0},
    {"seen": {0: 4}, "presence_penalty": 0.5, "frequency_penalty": -0.4, "top_p": 0.9},
    {"bias": {0: 4.5}, "top_k": 4},
    {"bias": {0: -100.0}, "seen": {0: 1}, "repetition_penalty": 0.5, "temperature": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab", VOCAB_SIZES)
def test_the_distribution_is_the_stated_one(vocab: int, options: dict[str, Any]) -> None:
    logits = random_row(vocab, seed=vocab)
    num_draws = 4000 if vocab < 1000 else 300
    frequencies = swept_distribution(logits, num_draws, options)
    expected = stated_distribution(logits, **options)
    # Each token owns one interval of u, so its frequency is exact to one draw at either end.
    assert np.abs(frequencies - expected).max() <= 1.01 / num_draws + 1e-5
    assert expected[frequencies > 0].all()


@pytest.mark.parametrize("top_p", [0.2, 0.7, 0.99])
def test_a_nucleus_of_thousands_is_exact(top_p: float) -> None:
    logits = random_row(49152, scale=0.5, seed=5)
    kept = np.flatnonzero(stated_distribution(logits, top_p=top_p))
    by_likelihood = kept[np.argsort(-logits[kept], kind="stable")]
    last = sample_token(logits, 1 - 2**-53, top_p=top_p).token
    rank = int(np.flatnonzero(by_likelihood == last)[0])
    assert len(kept) > 3000
    assert abs(rank - len(kept)) <= 2  # float32 sums may shift the edge by a token


def bits(tokens: npt.NDArray[np.int64], vocab: int) -> npt.NDArray[np.int32]:
    """A mask with a bit set for each of the tokens."""
    flags = np.zeros(-(-vocab // 32) * 32, dtype=np.uint8)
    flags[tokens] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab", VOCAB_SIZES)
def test_tokens_that_are_not_allowed_are_out_before_anything_is_cut(
    vocab: int, options: dict[str, Any]
) -> None:
    logits = random_row(vocab, seed=vocab)
    allowed = np.union1d(np.random.default_rng(vocab).integers(0, vocab, 40), [0])
    excluded = np.full_like(logits, -np.inf)
    excluded[allowed] = logits[allowed]
    mask = bits(allowed, vocab)
    for u in (0.0, 0.3, 0.7, 0.999):
        arguments = native_arguments(options)
        masked = sample_token(logits, u, allowed=mask, num_logprobs=3, **arguments)
        assert masked.token == sample_token(excluded, u, **arguments).token
        assert masked.token in allowed
        # What is reported is of the raw distribution.
        assert masked.top_ids == sample_token(logits, u, num_logprobs=3).top_ids
    greedy = sample_token(logits, 0.0, temperature=0.0, allowed=mask)
    assert greedy.token == allowed[logits[allowed].argmax()]


def test_a_mask_without_any_token_gives_none() -> None:
    chosen = sample_token(random_row(97), 0.5, allowed=np.zeros(4, dtype=np.int32))
    assert (chosen.status, chosen.token) == (SampleStatus.EMPTY, -1)
    all_set = np.full(4, -1, dtype=np.int32)  # bits beyond the vocabulary mean nothing
    assert sample_token(random_row(97), 0.5, allowed=all_set).token < 97


def test_a_mask_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="ceil"):
        sample_token(random_row(97), 0.5, allowed=np.zeros(3, dtype=np.int32))


@pytest.mark.parametrize("vocab", VOCAB_SIZES)
def test_a_given_token_is_scored_as_if_it_had_been_chosen(vocab: int) -> None:
    logits = random_row(vocab)
    for u in (0.01, 0.5, 0.99):
        chosen = sample_token(logits, u, num_logprobs=5)
        assert score_token(logits, chosen.token, 5) == chosen
    assert score_token(logits * np.float32("nan"), 0, 1).status is SampleStatus.NAN
    with pytest.raises(ValueError, match="token must lie"):
        score_token(logits, vocab, 0)


@pytest.mark.parametrize("vocab", VOCAB_SIZES)
def test_greedy_takes_the_lowest_id_of_equals(vocab: int) -> None:
    logits = random_row(vocab)
    best = logits.max() + 1
    logits[[vocab // 3, vocab // 2, vocab - 1]] = best
    assert greedy_token(logits).token == vocab // 3
    assert sample_token(logits, 0.0, temperature=0.0).token == vocab // 3
    assert sample_token(logits, 0.99, top_k=1).token == vocab // 3
    assert sample_token(logits, 0.99, top_p=1e-12).token == vocab // 3


def test_equal_logits_are_drawn_evenly_and_cut_by_id() -> None:
    logits = np.zeros(10, dtype=np.float32)
    assert np.allclose(swept_distribution(logits, 1000, {}), 0.1)
    assert np.flatnonzero(swept_distribution(logits, 100, {"top_k": 4})).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(swept_distribution(logits, 100, {"top_p": 0.35})).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.0}], ids=str
)
def test_a_token_of_probability_zero_is_never_drawn(u: float, options: dict[str, Any]) -> None:
    for vocab in (7, 49152):
        logits = np.full(vocab, -np.inf, dtype=np.float32)
        logits[vocab - 2] = -50.0
        assert sample_token(logits, u, **options).token == vocab - 2


def test_every_draw_at_the_edges_gives_a_possible_token() -> None:
    logits = random_row(5000, scale=30.0)
    for u in (0.0, 5e-324, 0.5, 1 - 2**-53):
        token = sample_token(logits, u, temperature=0.01).token
        assert token == logits.argmax()


@pytest.mark.parametrize(
    ("bad", "status"),
    [(np.nan, SampleStatus.NAN), (np.inf, SampleStatus.INFINITE)],
)
@pytest.mark.parametrize("vocab", VOCAB_SIZES)
def test_unusable_logits_are_reported(vocab: int, bad: float, status: SampleStatus) -> None:
    for place in {0, vocab // 2, vocab - 1}:
        logits = random_row(vocab)
        logits[place] = bad
        for outcome in (greedy_token(logits), sample_token(logits, 0.5)):
            assert outcome.status is status
            assert outcome.token == -1


def test_a_row_without_any_possible_token_is_reported() -> None:
    logits = np.full(97, -np.inf, dtype=np.float32)
    assert greedy_token(logits).status is SampleStatus.EMPTY
    assert "no token" in sample_token(logits, 0.5).status.description


@pytest.mark.parametrize("vocab", VOCAB_SIZES)
def test_logprobs_are_raw_whatever_is_done_to_the_logits(vocab: int) -> None:
    logits = random_row(vocab)
    exact = logits.astype(np.float64)
    expected = exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())
    bias = np.array([vocab - 1], dtype=np.int32)
    outcome = sample_token(
        logits,
        0.3,
        temperature=0.2,
        top_k=2,
        bias_ids=bias,
        bias_values=np.array([90], dtype=np.float32),
        num_logprobs=5,
    )
    order = np.argsort(-expected, kind="stable")
    assert outcome.token == vocab - 1
    assert outcome.logprob == pytest.approx(expected[vocab - 1], abs=2e-6)
    assert outcome.rank == 1 + int((expected > expected[vocab - 1]).sum())
    assert outcome.top_ids == tuple(order[:5])
    assert outcome.top_logprobs == pytest.approx(expected[order[:5]], abs=2e-6)


def test_the_logits_are_left_as_they_are() -> None:
    logits = random_row(97)
    before = logits.copy()
    ids = np.array([3], dtype=np.int32)
    sample_token(
        logits, 0.5, seen_ids=ids, seen_counts=ids, repetition_penalty=2.0, bias_ids=ids,
        bias_values=np.ones(1, dtype=np.float32),
    )  # fmt: skip
    assert np.array_equal(logits, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"u": 1.0}, "u must lie in"),
        ({"u": float("nan")}, "u must lie in"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"seen_ids": np.array([97], dtype=np.int32)}, "same length"),
        (
            {"seen_ids": np.array([97], "i4"), "seen_counts": np.array([1], "i4")},
            r"seen_ids must lie in \[0, 97\), got 97",
        ),
        (
            {"bias_ids": np.array([-1], "i4"), "bias_values": np.array([1], "f4")},
            "bias_ids must lie in",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_token(random_row(97), **{"u": 0.5, **arguments})


@pytest.mark.parametrize(
    "logits",
    [np.zeros(9), np.zeros((3, 3), dtype=np.float32), np.zeros(18, dtype=np.float32)[::2]],
)
def test_arrays_of_another_kind_are_refused(logits: npt.NDArray[Any]) -> None:
    with pytest.raises(TypeError):
        greedy_token(logits)


def test_an_empty_row_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        greedy_token(np.zeros(0, dtype=np.float32))
