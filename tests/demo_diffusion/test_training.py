"""The training loop of the demo model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools.demo_diffusion import network, tokenizer, train_unet


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer(folder: Path) -> train_unet.Trainer:
    words = tokenizer.write(folder / "tokenizer", network.MAX_TOKENS)
    torch.manual_seed(0)
    latents = torch.randn(32, 4, 16, 16).half()
    tokens = network.tokenize(words, ["a red circle", ""])
    data = train_unet.Encoded(latents, tokens[:1].expand(32, -1), tokens[1])
    return train_unet.Trainer(data, network.text_encoder(words), seed=0)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def save(whole: train_unet.Trainer) -> None:
        whole.save(tmp_path / f"{whole.step}.safetensors")

    trainer(tmp_path).run(4, 2, save)
    resumed = trainer(tmp_path)
    resumed.load(tmp_path / "2.safetensors")
    resumed.run(4, 10, lambda it: it.save(tmp_path / "resumed.safetensors"))
    whole, again = (
        train_unet.load_file(tmp_path / f) for f in ("4.safetensors", "resumed.safetensors")
    )
    for name in whole.keys() - {"cpu_seconds"}:
        torch.testing.assert_close(again[name], whole[name], rtol=1e-5, atol=1e-6)
