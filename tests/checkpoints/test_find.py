from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fuserve.checkpoints import open_checkpoint
from fuserve.checkpoints.find import find_model
from fuserve.errors import CheckpointError, MissingExtraError, ModelNotFoundError

_REPO = "fuserve-tests/tiny"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, and no network to fill it from."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def _put_into_cache(cache: Path, folder: Path) -> Path:
    """What ``hf download`` leaves behind."""
    repo = cache / f"models--{_REPO.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_demo_is_the_packaged_file():
    assert find_model("demo").name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_demo_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fuserve\[demo\]'"):
        find_model("demo")


def test_a_folder_and_a_file_are_found_as_text_and_as_path(write_folder, write_gguf, tensors):
    folder, file = write_folder(tensors), write_gguf(tensors)
    assert find_model(str(folder)) == find_model(folder) == folder
    assert find_model(str(file)) == find_model(file) == file
    assert open_checkpoint(str(file)).format == "gguf"


def test_a_folder_with_a_single_gguf_stands_for_it(write_gguf, tensors):
    file = write_gguf(tensors)
    assert find_model(file.parent) == file
    write_gguf(tensors, name="second.gguf")
    with pytest.raises(CheckpointError, match=r"2 GGUF files.*Name one"):
        find_model(file.parent)


def test_a_cached_hub_model_opens_without_network(hub_cache, write_folder, tensors):
    snapshot = _put_into_cache(hub_cache, write_folder(tensors))
    checkpoint = open_checkpoint(_REPO)
    assert checkpoint.path == snapshot
    assert "layer.bias" in checkpoint


def test_one_gguf_of_a_cached_hub_model_can_be_named(hub_cache, write_gguf, tensors, tmp_path):
    folder = tmp_path / "quants"
    folder.mkdir()
    write_gguf(tensors).rename(folder / "tiny.Q8_0.gguf")
    snapshot = _put_into_cache(hub_cache, folder)
    assert open_checkpoint(f"{_REPO}/tiny.Q8_0.gguf").path == snapshot / "tiny.Q8_0.gguf"
    with pytest.raises(ModelNotFoundError, match=r"tiny/other\.gguf.*HF_HUB_OFFLINE"):
        find_model(f"{_REPO}/other.gguf")


def test_offline_mode_is_named_when_a_model_is_not_cached(hub_cache):
    with pytest.raises(ModelNotFoundError, match=r"'fuserve-tests/tiny'.*HF_HUB_OFFLINE is set"):
        find_model(_REPO)


def test_the_environment_variable_keeps_us_off_the_network(tmp_path):
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('touched the network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from fuserve.checkpoints.find import find_model\n"
        "from fuserve.errors import ModelNotFoundError\n"
        "try: find_model('fuserve-tests/tiny')\n"
        "except ModelNotFoundError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "HF_HUB_OFFLINE is set" in done.stdout, done.stderr


def test_a_hub_that_cannot_be_reached_is_not_called_a_wrong_name(hub_cache, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelNotFoundError, match=r"no route to host\). Check the network"):
        find_model(_REPO)


@pytest.mark.parametrize(
    "model",
    [
        "./no/such/folder",
        "/nowhere",
        "missing.gguf",
        "a b",
        "../x/y/z",
        "",
        "~no-such-user/x",
        "x" * 5000,
        "\0",
    ],
)
def test_what_is_neither_here_nor_a_hub_id_never_asks_the_hub(model, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    asked: list[object] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked.append)
    with pytest.raises((ModelNotFoundError, CheckpointError)):
        open_checkpoint(model)
    assert not asked


def test_a_safetensors_file_is_answered_with_its_folder(write_folder, tensors):
    folder = write_folder(tensors)
    with pytest.raises(CheckpointError, match=f"give the folder: {folder}"):
        find_model(folder / "model.safetensors")
