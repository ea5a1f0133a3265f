"""Where a diffusion model, its tokenizer and its LoRAs come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuserve.checkpoints.find import find_diffusion_model, find_lora, find_tokenizer
from fuserve.errors import CheckpointError, ModelNotFoundError


@pytest.fixture
def demo_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as it would be installed; importing it fails."""
    package = tmp_path / "site" / "fuserve_demo_diffusion"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(package.parent))
    return package


def test_the_demo_is_found_in_its_package_without_importing_it(demo_package: Path) -> None:
    (demo_package / "model").mkdir()
    (demo_package / "model" / "model_index.json").write_text("{}")
    assert find_diffusion_model("demo-diffusion") == demo_package / "model"


def test_a_demo_without_its_model_says_what_to_install(demo_package: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="packages/fuserve-demo-diffusion"):
        find_diffusion_model("demo-diffusion")


def test_folders_and_safetensors_files_are_found(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert find_diffusion_model(str(tmp_path)) == tmp_path
    assert find_diffusion_model(str(file)) == find_lora(file) == file
    assert find_lora(tmp_path) == find_tokenizer(str(tmp_path)) == tmp_path


def test_pickles_and_other_files_are_refused(tmp_path: Path) -> None:
    for name, fault in (("model.ckpt", "pickle"), ("model.gguf", r"\.safetensors file")):
        (tmp_path / name).write_bytes(b"not looked at")
        for find in (find_diffusion_model, find_lora):
            with pytest.raises(CheckpointError, match=fault):
                find(tmp_path / name)


def test_what_is_nowhere_is_named(tmp_path: Path) -> None:
    for find in (find_diffusion_model, find_lora, find_tokenizer):
        with pytest.raises(ModelNotFoundError, match=r"no/such/folder"):
            find("no/such/folder.safetensors")
