"""Quantizing whole models into folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fuserve.calibration import CalibrationOptions, quantize_model
from fuserve.calibration.layout import LayoutName
from fuserve.checkpoints import load_tokenizer, open_checkpoint, to_float32
from fuserve.decoder import ExecutorOptions, load_model
from fuserve.decoder.weights import CheckpointWeights
from fuserve.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from fuserve.quantization import LayerChoice, QuantScheme, recipe_named
from fuserve.quantization.smoothquant import Smoothing
from tests.calibration.small_models import sized_model, write_text

OPTIONS = CalibrationOptions(num_samples=6, sample_tokens=32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    sized_model("llama", folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def quantized(
    source: Path,
    output: Path,
    text: Path,
    scheme: str,
    *layers: str,
    options: CalibrationOptions = OPTIONS,
    layout: LayoutName = "auto",
    group_size: int | None = 32,
) -> CheckpointWeights:
    recipe = recipe_named(scheme)
    if recipe.scheme.is_weight_only:
        recipe = recipe_named(scheme, group_size)
    choice = LayerChoice.parse(recipe, layers)
    quantize_model(open_checkpoint(source), output, choice, options, layout=layout, text=text)
    return CheckpointWeights(open_checkpoint(output))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("scheme", ("int4", "gptq", "awq", "smoothquant", "smoothquant-static"))
def test_equal_seeds_give_equal_files(scheme: str, llama: Path, text: Path, tmp_path: Path) -> None:
    for name in ("once", "again"):
        quantized(llama, tmp_path / name, text, scheme)
    assert contents(tmp_path / "once") == contents(tmp_path / "again")


def test_another_seed_calibrates_on_other_windows(llama: Path, text: Path, tmp_path: Path) -> None:
    quantized(llama, tmp_path / "0", text, "gptq")
    other = CalibrationOptions(num_samples=6, sample_tokens=32, seed=1)
    quantized(llama, tmp_path / "1", text, "gptq", options=other)
    assert contents(tmp_path / "0") != contents(tmp_path / "1")


def test_an_interrupted_run_goes_on_and_ends_with_the_same_files(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    class Interruption(Exception):
        pass

    def interrupt(_stage: str, done: int, _total: int) -> None:
        if done == 2:
            raise Interruption

    choice = LayerChoice.parse(recipe_named("gptq", 32), [])
    checkpoint, broken = open_checkpoint(llama), tmp_path / "broken"
    with pytest.raises(Interruption):
        quantize_model(checkpoint, broken, choice, OPTIONS, text=text, progress=interrupt)
    done: list[int] = []
    quantize_model(
        checkpoint, broken, choice, OPTIONS, text=text, progress=lambda _, i, __: done.append(i)
    )
    assert done == [2, 3]
    quantized(llama, tmp_path / "whole", text, "gptq")
    assert contents(broken) == contents(tmp_path / "whole")


@pytest.mark.parametrize("scheme", ("int8", "gptq"))
def test_a_run_that_was_interrupted_before_its_first_layer_goes_on(
    scheme: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    def interrupt(_stage: str, _done: int, _total: int) -> None:
        raise KeyboardInterrupt

    choice = LayerChoice.parse(recipe_named(scheme, 32), [])
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        quantize_model(
            open_checkpoint(llama), broken, choice, OPTIONS, text=text, progress=interrupt
        )
    quantized(llama, broken, text, scheme)
    quantized(llama, tmp_path / "whole", text, scheme)
    assert contents(broken) == contents(tmp_path / "whole")


def test_an_unfinished_folder_is_not_continued_with_other_options(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    def interrupt(_stage: str, done: int, _total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    choice = LayerChoice.parse(recipe_named("gptq", 32), [])
    with pytest.raises(KeyboardInterrupt):
        quantize_model(
            open_checkpoint(llama), tmp_path, choice, OPTIONS, text=text, progress=interrupt
        )
    with pytest.raises(CheckpointError, match="no config"):
        open_checkpoint(tmp_path)
    with pytest.raises(InvalidRequestError, match="unfinished quantization of another"):
        quantized(llama, tmp_path, text, "awq")


def test_a_folder_with_other_files_is_not_written_to(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidRequestError, match="is not empty"):
        quantized(llama, tmp_path, text, "int8")


def test_layers_get_the_schemes_that_patterns_choose(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    weights = quantized(
        llama, tmp_path, text, "gptq", "layers.1.down=int8:64", "layers.2.*=keep", "lm_head=int8:0"
    )
    assert weights.scheme("layers.0.down") == QuantScheme(4, 32, symmetric=False)
    assert weights.scheme("layers.1.down") == QuantScheme(8, 64)
    assert weights.scheme("layers.2.q") is None
    assert weights.scheme("head") == QuantScheme(8)
    assert weights.dtype("layers.2.q") == "F32"


@pytest.mark.parametrize("layout", ("compressed-tensors", "gptq"))
@pytest.mark.parametrize("scheme", ("gptq", "gptq-int8", "awq", "int8"))
def test_layouts_hold_the_same_numbers(
    scheme: str, layout: LayoutName, llama: Path, text: Path, tmp_path: Path
) -> None:
    want = quantized(llama, tmp_path / "want", text, scheme)
    weights = quantized(llama, tmp_path / "other", text, scheme, layout=layout)
    for name in ("layers.0.q", "layers.2.down"):
        np.testing.assert_array_equal(
            to_float32(weights.tensor(name)), to_float32(want.tensor(name))
        )


def test_awq_layout_holds_the_same_numbers(llama: Path, text: Path, tmp_path: Path) -> None:
    want = quantized(llama, tmp_path / "want", text, "awq")
    weights = quantized(llama, tmp_path / "other", text, "awq", layout="awq")
    assert weights.scheme("layers.0.q") == QuantScheme(4, 32, symmetric=False)
    for name in ("layers.0.q", "layers.2.down"):
        np.testing.assert_array_equal(
            to_float32(weights.tensor(name)), to_float32(want.tensor(name))
        )


def test_llm_int8_is_written_as_bitsandbytes_has_it(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    weights = quantized(llama, tmp_path, text, "llm-int8")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert config["llm_int8_threshold"] == 6.0
    assert weights.scheme("layers.0.q") == recipe_named("llm-int8").scheme


def test_static_activations_have_one_step_for_all_that_read_them(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    weights = quantized(llama, tmp_path, text, "smoothquant-static")
    layers = [weights.tensor(f"layers.1.{name}").quantized for name in ("q", "k", "v", "o")]
    assert all(one is not None and one.input_scale for one in layers)
    scales = [one.input_scale for one in layers if one is not None]
    assert scales[0] == scales[1] == scales[2] != scales[3]


def test_layers_of_one_input_with_different_steps_are_refused(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    quantized(llama, tmp_path, text, "w8a8-static")
    (shard,) = tmp_path.glob("model-00001-of-*")
    arrays = load_file(shard)
    arrays["model.layers.0.self_attn.k_proj.input_scale"] *= 2
    save_file(arrays, shard)
    with pytest.raises(CheckpointError, match=r"another input_scale than layers\.0\.q"):
        load_model(str(tmp_path), ExecutorOptions(max_model_len=64, max_num_seqs=1))


def test_what_no_norm_can_take_up_is_left_to_run_time_and_marked_so(
    tmp_path: Path, text: Path
) -> None:
    """BLOOM's GELU stands between up and down; no layout but our own has a vector there."""
    source = tmp_path / "bloom"
    sized_model("bloom", source)
    options = CalibrationOptions(
        num_samples=6, sample_tokens=32, smoothing=Smoothing(alpha=0.5, shift=True)
    )
    weights = quantized(source, tmp_path / "out", text, "smoothquant", options=options)
    down, query = (weights.tensor(f"layers.0.{name}").quantized for name in ("down", "q"))
    assert down is not None and query is not None
    assert down.input_smoothing is not None and down.input_shift is not None
    assert query.input_smoothing is None and query.input_shift is None
    assert down.output_shift is None  # its bias has taken it up
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fuserve"


def test_a_gguf_becomes_a_folder_with_config_and_tokenizer(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("demo")
    choice = LayerChoice.parse(recipe_named("int8"), ["layers.1?.*=keep", "layers.2?.*=keep"])
    report = quantize_model(checkpoint, tmp_path, choice, OPTIONS)
    assert report.schemes == {"int8, groups of 128": 70}
    written = open_checkpoint(tmp_path)
    sentence = "Call me Ishmael. Ça va? 42"
    ours, theirs = load_tokenizer(written), load_tokenizer(checkpoint)
    assert ours.encode(sentence) == theirs.encode(sentence)
    assert ours.eos_token_ids == theirs.eos_token_ids
    messages = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    weights = CheckpointWeights(written)
    assert weights.spec.layers[0].rope is not None
    assert not weights.spec.layers[0].rope.interleaved


def test_a_pattern_of_no_layer_is_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"'layers\.9\.\*' matches no layer.*'layers\.0\."
    ):
        quantized(llama, tmp_path / "out", text, "int8", "layers.9.*=keep")
    assert not (tmp_path / "out").exists()


def test_what_is_quantized_already_is_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    quantized(llama, tmp_path / "once", text, "int8")
    with pytest.raises(InvalidRequestError, match="quantized already"):
        quantized(tmp_path / "once", tmp_path / "twice", text, "int4")


def test_transposed_weights_have_no_quantized_layout(tmp_path: Path, text: Path) -> None:
    sized_model("gpt2", tmp_path / "gpt2")
    with pytest.raises(UnsupportedModelError, match="stored transposed"):
        quantized(tmp_path / "gpt2", tmp_path / "out", text, "int8")


@pytest.mark.parametrize(
    ("scheme", "layout", "message"),
    (
        ("w8a8", "gptq", "no place for int8, per channel, int8 activations"),
        ("gptq-int8", "awq", "no place for int8"),
        ("llm-int8", "compressed-tensors", "outliers in float"),
        ("int4", "bitsandbytes", "no place for int4"),
    ),
)
def test_a_layout_without_a_place_for_the_scheme_is_refused(
    scheme: str, layout: LayoutName, message: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        quantized(llama, tmp_path / "out", text, scheme, layout=layout)


def test_groups_that_are_cut_short_are_written_and_other_readers_limits_named(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    choice = LayerChoice.parse(recipe_named("int4", 128), [])
    report = quantize_model(open_checkpoint(llama), tmp_path, choice, OPTIONS, text=text)
    assert "do not divide the 64 inputs of layers.0.q" in report.limits[0]
    weights = CheckpointWeights(open_checkpoint(tmp_path))
    want = to_float32(CheckpointWeights(open_checkpoint(llama)).tensor("layers.0.q"))
    values = to_float32(weights.tensor("layers.0.q"))
    assert np.abs(values - want).max() < 0.1 * np.abs(want).max()
