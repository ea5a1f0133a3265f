"""Layer by layer in numpy is what the models compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fuserve.calibration.forward import LayerForward
from fuserve.calibration.layer import with_rounded_weights
from fuserve.calibration.places import places_of
from fuserve.calibration.source import SourceModel, open_source
from fuserve.checkpoints import open_checkpoint
from tests.parity.random_models import VARIANTS, random_model

NUM_TOKENS = 37
# transformers looks at the length of the call to choose LongRoPE's factors, we at the longest.
VARIANTS_HERE = [name for name in VARIANTS if name != "phi3-longrope-short"]


def run(source: SourceModel, tokens: np.ndarray, change: bool = False) -> np.ndarray:
    """Logits, each layer's places smoothed and shifted before if ``change``."""
    spec = source.spec
    tensors = {name: source.array(name) for name in source.names(None)}
    runner = LayerForward(spec, tokens.shape[1])
    hidden = runner.embed(tokens, tensors)
    rng = np.random.default_rng(0)
    for index, kind in enumerate(spec.layers):
        prefix = f"layers.{index}."
        layer = {n.removeprefix(prefix): source.array(n) for n in source.names(index)}
        if change:
            for place in places_of(spec):
                size = layer[place.linears[0]].shape[1]
                factors = np.exp(rng.standard_normal(size)).astype(np.float32)
                shift = rng.standard_normal(size).astype(np.float32)
                if place.share is not None:
                    factors, shift = factors[place.share], shift[place.share]
                shares = {name: layer[name] @ shift for name in place.linears}
                if place.fold_shift(layer, shift):
                    for name in place.linears:
                        layer[f"{name}.bias"] = layer.get(f"{name}.bias", 0) + shares[name]
                if not place.fold_smoothing(layer, factors):
                    for name in place.linears:
                        layer[name] = layer[name] / factors
        hidden = runner.layer(kind, with_rounded_weights(layer, {}), hidden)
    hidden = runner.last(tensors, hidden)
    head = tensors["embedding" if spec.tied_head else "head"]
    logits = hidden @ head.T + tensors.get("head.bias", np.float32(0))
    cap = spec.logit_softcap
    return logits if cap is None else cap * np.tanh(logits / cap)


@pytest.mark.parametrize("name", VARIANTS_HERE)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = random_model(name, tmp_path)
    vocab_size = model.model.config.get_text_config().vocab_size
    tokens = np.random.default_rng(1).integers(3, vocab_size - 3, (2, NUM_TOKENS))
    logits = run(open_source(open_checkpoint(tmp_path)), tokens)
    with torch.inference_mode():
        want = model.model(torch.from_numpy(tokens)).logits.numpy()
    if name != "phi3-longrope-long":
        assert np.abs(logits - want).max() < 2e-4 * want.std()


@pytest.mark.parametrize(
    "name",
    ("llama", "llama-biases-tied", "qwen3", "gemma2", "phi3", "opt", "opt-post-norm", "gpt2"),
)
def test_folded_shifts_and_factors_change_no_logits(name: str, tmp_path: Path) -> None:
    model = random_model(name, tmp_path)
    vocab_size = model.model.config.get_text_config().vocab_size
    tokens = np.random.default_rng(2).integers(3, vocab_size - 3, (2, NUM_TOKENS))
    source = open_source(open_checkpoint(tmp_path))
    plain, folded = run(source, tokens), run(source, tokens, change=True)
    assert np.abs(folded - plain).max() < 2e-3 * plain.std()


def test_the_demo_model_is_the_same_after_its_rows_are_put_in_order() -> None:
    from fuserve.decoder.reference import ReferenceExecutor
    from tests.parity.paging import PagedSequences

    source = open_source(open_checkpoint("demo"))
    tokens = np.array([[504, 3575, 282, 4649, 314, 7042, 30]])
    want = PagedSequences(ReferenceExecutor(source.weights, num_blocks=4)).step(
        {"only": tokens[0].tolist()}
    )["only"]
    assert np.abs(run(source, tokens)[0] - want).max() < 1e-3 * want.std()
