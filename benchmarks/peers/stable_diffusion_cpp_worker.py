"""stable-diffusion.cpp in fp32 (its convolutions keep float16 weights).

It makes whole pictures only, from a folder with a text encoder, which is written once. A step is
the time between two reports of its progress, the decoding what follows the last of them. Its noise
is its own, so there is no output to compare.
"""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise

import psutil
from image_worker import TEXT_CHANNELS, TOKENS, parse_work, print_answer

TEXT_ENCODER = f"""
import sys, torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel
torch.manual_seed(0)
config = CLIPTextConfig(vocab_size=49408, hidden_size={TEXT_CHANNELS}, intermediate_size=3072,
                        num_attention_heads=12, max_position_embeddings={TOKENS})
tensors = CLIPTextModel(config).state_dict()
prefix = "" if any(name.startswith("text_model.") for name in tensors) else "text_model."
save_file({{prefix + name: value.contiguous() for name, value in tensors.items()}}, sys.argv[1])
"""


def main() -> None:
    """Make one picture and print what its parts took as the last line of stdout."""
    work = parse_work()
    folder = work.folder.parent
    text_encoder = folder / "text_encoder" / "model.safetensors"
    if not text_encoder.exists():  # in a process of its own, whose memory does not count
        text_encoder.parent.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "-c", TEXT_ENCODER, str(text_encoder)], check=True)
    sys.path.append(work.option("site_packages"))  # behind this interpreter's own packages
    from stable_diffusion_cpp import StableDiffusion

    started = time.perf_counter()
    model = StableDiffusion(
        model_path=str(folder), n_threads=work.threads, wtype="f32", prediction="eps", verbose=False
    )
    load_s, loaded_rss_bytes = time.perf_counter() - started, psutil.Process().memory_info().rss
    reports: list[float] = []
    model.generate_image(
        "a picture",
        width=work.size,
        height=work.size,
        cfg_scale=7.0,
        sample_method="euler",
        sample_steps=work.steps if work.part == "unet" else 1,
        progress_callback=lambda step, steps, seconds: reports.append(time.perf_counter()),
    )
    seconds = [after - before for before, after in pairwise(reports)]
    if work.part == "vae":
        seconds = [time.perf_counter() - reports[-1]]
    print_answer(load_s, loaded_rss_bytes, seconds, {})


if __name__ == "__main__":
    main()
