"""What memory do a guided step and a decoding take? Stable Diffusion 1.5, random weights.

Each case runs in a process of its own. Its peak is of everything, the interpreter too; "above
weights" is how much it rises over what the process holds when the weights are packed. Decodings
in bands are compared with whole ones to the bit. Writes JSON and Markdown.

    python benchmarks/diffusion_memory.py
    python benchmarks/diffusion_memory.py --cases half,bands --folder FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from diffusion_peers import RESULTS, Contestant, random_folder, run_worker

WORKER = "fuserve_image_worker.py"
CASES: dict[str, tuple[str, int, Contestant]] = {
    "float32": ("unet", 512, Contestant("UNet, 512 x 512, float32", WORKER)),
    "exact": ("unet", 512, Contestant("UNet, exact_conv", WORKER, ("exact_conv=1",))),
    "half": ("unet", 512, Contestant("UNet, float16 weights", WORKER, ("half=1",))),
    "decode": ("vae", 512, Contestant("decoding 512 x 512", WORKER)),
    "whole": ("vae", 1024, Contestant("decoding 1024 x 1024, whole", WORKER, ("whole=1",))),
    "bands": ("vae", 1024, Contestant("decoding 1024 x 1024, in bands", WORKER)),
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1, help="runs in each process")
    parser.add_argument("--folder", type=Path, help="with unet/ and vae/; by default random ones")
    given = parser.parse_args()
    folder = given.folder or random_folder()
    rows: list[dict[str, Any]] = []
    outputs: dict[str, Any] = {}
    for name in given.cases.split(","):
        part, given.size, contestant = CASES[name]
        answer, outputs[name] = run_worker(contestant, part, folder, given)
        rows.append({"case": name, "label": contestant.label, **answer})
        print(to_markdown(rows[-1:]).splitlines()[-1], flush=True)
    if {"whole", "bands"} <= outputs.keys():
        same = np.array_equal(outputs["whole"], outputs["bands"])
        print(f"in bands and whole: {'the same bits' if same else 'DIFFERENT'}")
    markdown = to_markdown(rows)
    print(markdown)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "diffusion_memory.json").write_text(json.dumps(rows, indent=2) + "\n")
    (RESULTS / "diffusion_memory.md").write_text(markdown + "\n")


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = ["| | peak memory | packed weights | above weights | seconds |", "|---" * 5 + "|"]
    for row in rows:
        above = row["peak_rss_bytes"] - row["loaded_rss_bytes"]
        lines.append(
            f"| {row['label']} | {_gigabytes(row['peak_rss_bytes'])} | "
            f"{_gigabytes(row['packed_bytes'])} | {_gigabytes(above)} | {row['first_s']:.1f} |"
        )
    return "\n".join(lines)


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
