from __future__ import annotations

import pickle

import pytest

from fuserve.checkpoints import load_tokenizer, open_checkpoint
from fuserve.errors import CheckpointError


class _Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self):
        return (open, (self.trace, "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "x.pt", "x.ckpt"])
def test_pickled_weights_are_refused_unread_with_a_way_to_convert_them(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    trace = tmp_path / "trace"
    weights = folder / name
    weights.write_bytes(pickle.dumps(_Bomb(str(trace))))
    for model in (folder, weights):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(model)
        words = str(caught.value)
        assert str(weights) in words and "fuserve never does" in words
        assert "from transformers import" in words and "save_pretrained" in words
    assert not trace.exists()


def test_pickles_beside_safetensors_are_left_alone(folder, open_and_use):
    (folder / "pytorch_model.bin").write_bytes(b"\x80\4.")
    assert open_and_use(folder) is None


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\x80\4.", b'{"version":"1.0","model":{"type":"X"}}',
     b"{" * 9999],
)  # fmt: skip
def test_a_damaged_tokenizer_json_is_named(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not a tokenizer"):
        load_tokenizer(open_checkpoint(folder))


def test_a_chat_template_that_is_not_text_is_named(folder):
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot be read"):
        load_tokenizer(open_checkpoint(folder))
