"""Loading: the packed cache, the memory plan, and clear refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fuserve.decoder import ExecutorOptions, load_model
from fuserve.decoder import load as load_module
from fuserve.errors import CapacityError, InvalidRequestError, ModelNotFoundError
from tests.parity.paging import PagedSequences

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
OPTIONS = ExecutorOptions(max_model_len=128)
DUMMY = replace(OPTIONS, load_format="dummy")
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_second_start_maps_what_the_first_packed(cache: Path) -> None:
    first = load_model("demo", OPTIONS)
    second = load_model("demo", OPTIONS)
    assert not first.report.from_cache
    assert second.report.from_cache
    logits = [PagedSequences(m.executor).step({"a": TOKENS})["a"] for m in (first, second)]
    assert np.array_equal(*logits)
    assert len(list(cache.rglob("*.packed"))) == 1


def test_other_options_have_another_cache_file(cache: Path) -> None:
    load_model("demo", OPTIONS)
    other = load_model("demo", replace(OPTIONS, quantization="int8"))
    assert not other.report.from_cache
    assert len(list(cache.rglob("*.packed"))) == 2


def test_what_activations_become_is_no_matter_of_the_cache_file(cache: Path) -> None:
    load_model("demo", OPTIONS)
    assert load_model("demo", replace(OPTIONS, activations="float")).report.from_cache
    assert load_model("demo", OPTIONS).report.from_cache


@pytest.mark.parametrize("damage", ["truncated", "wrong header"])
def test_a_damaged_cache_file_is_packed_anew(cache: Path, damage: str) -> None:
    load_model("demo", OPTIONS)
    (file,) = cache.rglob("*.packed")
    if damage == "truncated":
        with file.open("r+b") as stream:
            stream.truncate(100_000)
    else:
        with file.open("r+b") as stream:
            stream.seek(20)
            stream.write(b"\0\0\0\0")
    assert not load_model("demo", OPTIONS).report.from_cache
    assert load_model("demo", OPTIONS).report.from_cache


def test_a_cache_folder_that_cannot_be_written_only_costs_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("FUSERVE_CACHE", str(blocked))
    for _ in range(2):
        assert not load_model("demo", OPTIONS).report.from_cache


def test_an_interrupted_packing_leaves_no_file(cache: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_model("demo", OPTIONS, interrupt)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_dummy_weights_come_from_a_config_alone(config: Path) -> None:
    for quantization in (None, "int8", "int4"):
        model = load_model(str(config), replace(DUMMY, quantization=quantization))
        logits = PagedSequences(model.executor).step({"a": TOKENS})["a"]
        assert logits.shape == (len(TOKENS), 97)
        assert np.isfinite(logits).all()


def test_quantized_weights_are_smaller_and_the_report_says_how_they_are_held(
    config: Path,
) -> None:
    sizes = {}
    for quantization in (None, "int8", "int4"):
        options = replace(DUMMY, quantization=quantization, quantize_embeddings=bool(quantization))
        report = load_model(str(config), options).report
        sizes[quantization] = report.bytes_read_per_token
        assert report.formats["layers.0.q"].startswith(quantization or "float16")
        assert report.formats["embedding"].startswith(quantization or "float16")
    # Features are padded to 64 here, which costs the quantized formats a third.
    assert sizes["int8"] < 0.75 * sizes[None]
    assert sizes["int4"] < 0.62 * sizes["int8"]


def test_reference_and_native_executors_answer_alike(config: Path) -> None:
    native, reference = (
        load_model(str(config), replace(DUMMY, dtype="float32", executor=kind))
        for kind in ("native", "reference")
    )
    a, b = (PagedSequences(m.executor).step({"a": TOKENS})["a"] for m in (native, reference))
    assert np.abs(a - b).max() < 1e-4 * b.std()


def test_a_missing_or_broken_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        load_model(str(tmp_path), DUMMY)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match="not a JSON config"):
        load_model(str(tmp_path), DUMMY)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"max_model_len": 4096}, "beyond the 512 positions"),
        ({"group_size": 64}, "need quantization"),
        ({"quantize_layers": ("layers.9.*=int8",)}, r"'layers\.9\.\*' matches no layer"),
        ({"quantization": "int4", "group_size": 16}, "group_size 16 is not supported"),
    ],
)
def test_contradictory_options_are_refused(
    config: Path, changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        load_model(str(config), replace(DUMMY, **changes))


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "available_memory", lambda: 10_000)
    with pytest.raises(CapacityError, match="the weights need"):
        load_model(str(config), DUMMY)


def test_memory_that_is_kept_for_an_image_model_is_not_planned_with(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = replace(DUMMY, max_model_len=None, max_num_seqs=1)
    monkeypatch.setattr(load_module, "available_memory", lambda: 10_000_000)
    assert load_model(str(config), wanted, reserved_bytes=0).max_model_len == 512
    assert load_model(str(config), wanted, reserved_bytes=9_800_000).max_model_len < 512
    with pytest.raises(CapacityError, match=r"0\.02 GB are to be kept for the image model"):
        load_model(str(config), wanted, reserved_bytes=20_000_000)


def test_a_cache_too_small_for_the_wanted_length_is_refused(config: Path) -> None:
    with pytest.raises(CapacityError, match="a sequence of 128 tokens needs"):
        load_model(str(config), replace(DUMMY, kv_cache_bytes=1000))


def test_without_a_wanted_length_memory_decides(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = replace(DUMMY, max_model_len=None, max_num_seqs=1)
    assert load_model(str(config), wanted).max_model_len == 512
    monkeypatch.setattr(load_module, "available_memory", lambda: 200_000)
    assert load_model(str(config), wanted).max_model_len < 512
