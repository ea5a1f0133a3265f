"""Every family's logits equal those of transformers, whichever executor computes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fuserve.checkpoints import open_checkpoint
from fuserve.decoder.weights import CheckpointWeights
from tests.parity.paging import PagedSequences, build_executor
from tests.parity.random_models import VARIANTS, RandomModel, random_model

TOLERANCE = 1e-4  # of the standard deviation of the logits
EXECUTORS = ("reference", "native")

ModelOf = Callable[[str], RandomModel]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    models: dict[str, RandomModel] = {}

    def build(name: str) -> RandomModel:
        if name not in models:
            models[name] = random_model(name, tmp_path_factory.mktemp(name))
        return models[name]

    return build


def prompt(model: RandomModel, length: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed + length)
    vocab_size = model.model.config.get_text_config().vocab_size
    return rng.integers(3, vocab_size - 3, length).tolist()  # the last may stand for images


def expected_logits(model: RandomModel, tokens: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model.model(torch.tensor([tokens])).logits[0].numpy()


def paged(kind: str, model: RandomModel, seed: int = 0) -> PagedSequences:
    weights = CheckpointWeights(open_checkpoint(model.folder))
    return PagedSequences(build_executor(kind, weights, model.variant.max_model_len), seed)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / expected.std()
    assert error < TOLERANCE, f"error of {error:.2e} standard deviations"


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_states_are_those_of_transformers(name: str, kind: str, model_of: ModelOf) -> None:
    model = model_of(name)
    sequences = paged(kind, model)
    tokens = prompt(model, model.variant.lengths[-1])
    sequences.step({"only": tokens})
    with torch.inference_mode():
        base = model.model.base_model(torch.tensor([tokens]))
    assert_close(sequences.hidden["only"], base.last_hidden_state[0].numpy())


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", VARIANTS)
def test_prompts_of_any_length_have_the_logits_of_transformers(
    name: str, kind: str, model_of: ModelOf
) -> None:
    model = model_of(name)
    sequences = paged(kind, model)
    for length in model.variant.lengths:
        tokens = prompt(model, length)
        logits = sequences.step({f"{length} tokens": tokens})
        assert_close(logits[f"{length} tokens"], expected_logits(model, tokens))


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_continues_a_prompt_as_if_it_had_been_read_at_once(
    name: str, kind: str, model_of: ModelOf
) -> None:
    model = model_of(name)
    tokens = prompt(model, model.variant.lengths[-1])
    expected = expected_logits(model, tokens)
    sequences = paged(kind, model)
    num_prompt = len(tokens) - 6
    logits = [sequences.step({"only": tokens[:num_prompt]})["only"]]
    logits += [sequences.step({"only": [token]})["only"] for token in tokens[num_prompt:]]
    assert_close(np.concatenate(logits), expected)


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", VARIANTS)
def test_sequences_mixed_into_steps_do_not_disturb_each_other(
    name: str, kind: str, model_of: ModelOf
) -> None:
    model = model_of(name)
    longest = model.variant.lengths[-1]
    texts = {
        "long": prompt(model, longest, seed=1),
        "middle": prompt(model, model.variant.lengths[-2], seed=2),
        "late": prompt(model, longest, seed=3),
    }
    # Chunks of each sequence in each step: prefill beside decode, one joins late.
    plan = [
        {"long": 5, "middle": len(texts["middle"]) - 2},
        {"long": longest - 7, "middle": 1, "late": 1},
        {"late": longest - 2, "middle": 1, "long": 1},
        {"long": 1, "late": 1},
    ]
    sequences = paged(kind, model, seed=7)
    rows: dict[str, list[np.ndarray]] = {text: [] for text in texts}
    done = dict.fromkeys(texts, 0)
    for sizes in plan:
        chunks = {text: texts[text][done[text] : done[text] + n] for text, n in sizes.items() if n}
        for text, logits in sequences.step(chunks).items():
            rows[text].append(logits)
            done[text] += len(chunks[text])
    assert done == {text: len(tokens) for text, tokens in texts.items()}
    for text, tokens in texts.items():
        assert_close(np.concatenate(rows[text]), expected_logits(model, tokens))


@pytest.mark.parametrize("kind", EXECUTORS)
def test_decoding_past_the_trained_length_follows_dynamic_ntk(kind: str, tmp_path: Path) -> None:
    # A model of its own: transformers keeps the stretched frequencies for later prompts of
    # exactly the trained length, so a shared one answers differently the second time.
    model = random_model("llama-dynamic", tmp_path)
    trained = model.model.config.max_position_embeddings
    tokens = prompt(model, trained + 20)
    with torch.inference_mode():
        output = model.model(torch.tensor([tokens[:trained]]), use_cache=True)
        expected = [output.logits[0].numpy()]
        for token in tokens[trained:]:
            output = model.model(
                torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True
            )
            expected.append(output.logits[0].numpy())
    # One chunk for us: a position's rotation must not depend on how the prompt is cut.
    logits = paged(kind, model).step({"only": tokens})["only"]
    assert_close(logits, np.concatenate(expected))
