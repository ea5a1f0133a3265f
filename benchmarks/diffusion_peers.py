"""How fast are a guided step and a decoding of Stable Diffusion 1.5 beside other engines?

Every engine runs in a process of its own, on the same random weights of the full configuration and
the same inputs; rounds are interleaved and the median is reported, with the machine's ceiling
measured in the same run and each result's largest difference from diffusers'. Writes JSON and
Markdown.

    python benchmarks/diffusion_peers.py                       # 512 x 512, two threads
    python benchmarks/diffusion_peers.py --size 256 --steps 3 --operations
    python benchmarks/diffusion_peers.py --parts unet --quantization w8a8
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))

import openvino_setup  # noqa: E402
import stable_diffusion_cpp_setup  # noqa: E402

CACHE = HERE.parent / ".cache" / "peers" / "sd15-random"
RESULTS = HERE / "results"
PARTS = {"unet": "one guided step of the UNet", "vae": "one decoding of the autoencoder"}


@dataclass(frozen=True)
class Contestant:
    """One row of the table: an engine and its options."""

    label: str
    worker: str
    options: tuple[str, ...] = ()


def site_packages(environment: Path) -> str:
    """The option that tells a worker where a peer is installed."""
    return f"site_packages={sysconfig.get_path('purelib', vars={'base': str(environment)})}"


CONTESTANTS = {
    "diffusers": Contestant("diffusers eager", "diffusers_worker.py"),
    "channels_last": Contestant(
        "diffusers channels_last", "diffusers_worker.py", ("channels_last=1",)
    ),
    "openvino": Contestant(
        "OpenVINO fp32",
        "openvino_image_worker.py",
        (site_packages(openvino_setup.ENVIRONMENT),),
    ),
    "stable-diffusion.cpp": Contestant(
        "stable-diffusion.cpp",
        "stable_diffusion_cpp_worker.py",
        (site_packages(stable_diffusion_cpp_setup.ENVIRONMENT),),
    ),
    "fuserve": Contestant("fuserve fp32", "fuserve_image_worker.py"),
    "exact": Contestant("fuserve fp32, exact_conv", "fuserve_image_worker.py", ("exact_conv=1",)),
    "half": Contestant("fuserve float16 weights", "fuserve_image_worker.py", ("half=1",)),
}
SETUPS = {"openvino": openvino_setup, "stable-diffusion.cpp": stable_diffusion_cpp_setup}


def main() -> None:
    """Measure, print, write."""
    given = parse_arguments()
    given.engines = given.engines.split(",")
    for name, setup in SETUPS.items():
        if name in given.engines and not setup.make_environment(setup.ENVIRONMENT / "bin/python"):
            print(f"{name} does not install here: without its row", file=sys.stderr)
            given.engines.remove(name)
    folder = given.folder or random_folder()
    tables = {part: measure(part, folder, given) for part in given.parts.split(",")}
    result = {
        "machine": measure_machine(given.threads),
        "threads": given.threads,
        "size": given.size,
        "steps": given.steps,
        "rounds": given.rounds,
        "parts": tables,
    }
    markdown = to_markdown(result, with_operations=given.operations)
    print(markdown)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "diffusion_peers.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "diffusion_peers.md").write_text(markdown + "\n")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--engines",
        default="diffusers,channels_last,openvino,stable-diffusion.cpp,fuserve",
        help="of " + ", ".join(CONTESTANTS),
    )
    parser.add_argument("--parts", default="unet,vae", help="of " + ", ".join(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=2, help="runs in each process")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="with unet/ and vae/; by default random ones")
    parser.add_argument(
        "--quantization", choices=("w8a8",), help="also the UNet by fuserve, its weights rounded"
    )
    parser.add_argument(
        "--operations", action="store_true", help="also where fuserve's time goes, by kind"
    )
    return parser.parse_args()


def random_folder() -> Path:
    """Random weights of the full configurations, written once."""
    code = (
        "import json, sys, torch, diffusers; torch.manual_seed(0);"
        "config = json.load(open(sys.argv[1]));"
        "getattr(diffusers, config['_class_name']).from_config(config).save_pretrained(sys.argv[2])"
    )
    for part in PARTS:
        if not (CACHE / part / "config.json").exists():
            print(f"writing random weights of the {part}", file=sys.stderr)
            config = HERE / "configs" / f"sd15-{part}.json"
            command = [sys.executable, "-c", code, str(config), str(CACHE / part)]
            subprocess.run(command, check=True)
    return CACHE


def measure(part: str, folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every engine once a round; medians, the worst of memory, the largest difference."""
    contestants = {name: CONTESTANTS[name] for name in given.engines}
    if given.quantization and part == "unet":
        option = f"input_scales={input_scales(folder, given)}"
        rounded = Contestant("fuserve W8A8", "fuserve_image_worker.py", (option,))
        contestants[given.quantization] = rounded
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    outputs: dict[str, Any] = {}
    for turn in range(given.rounds):
        for name, contestant in contestants.items():
            print(f"{part}, round {turn + 1}: {contestant.label}", file=sys.stderr)
            answer, outputs[name] = run_worker(contestant, part, folder, given)
            print(f"  {answer['seconds']:.2f} s", file=sys.stderr, flush=True)
            runs[name].append(answer)
    oracle = outputs.get("diffusers")
    rows = []
    for name, answers in runs.items():
        difference = None
        if oracle is not None and outputs[name] is not None:
            difference = float(np.abs(outputs[name] - oracle).max() / np.abs(oracle).max())
        rows.append(
            {
                **answers[-1],
                "label": contestants[name].label,
                "seconds": median(answer["seconds"] for answer in answers),
                "peak_rss_bytes": max(answer["peak_rss_bytes"] for answer in answers),
                "largest_difference": difference,
            }
        )
    return rows


def input_scales(folder: Path, given: argparse.Namespace) -> Path:
    """Scales of the convolutions' inputs, measured once for each size."""
    save = folder / f"input-scales-{given.size}.json"
    if not save.exists():
        print("measuring the scales of convolutions' inputs", file=sys.stderr)
        subprocess.run(worker_command("input_scales.py", "unet", folder, given, save), check=True)
    return save


def worker_command(
    worker: str, part: str, folder: Path, given: argparse.Namespace, save: Path
) -> list[str]:
    """How a script of ``peers`` is called."""
    command = [sys.executable, str(HERE / "peers" / worker)]
    command += ["--folder", str(folder / part), "--part", part, "--save", str(save)]
    command += ["--threads", str(given.threads), "--size", str(given.size)]
    return [*command, "--steps", str(given.steps)]


def run_worker(
    contestant: Contestant, part: str, folder: Path, given: argparse.Namespace
) -> tuple[dict[str, Any], Any]:
    """One engine in a process of its own; what it answers, and its output if it has one."""
    with tempfile.TemporaryDirectory() as scratch:
        save = Path(scratch) / "output.npy"
        command = worker_command(contestant.worker, part, folder, given, save)
        for option in contestant.options:
            command += ["--option", option]
        environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"{contestant.label} failed with exit code {done.returncode}")
        output = np.load(save) if save.exists() else None
        return json.loads(done.stdout.splitlines()[-1]), output


def measure_machine(threads: int) -> dict[str, Any]:
    """Ceilings of this machine, in a process of their own."""
    code = (
        "import json; from fuserve.kernels import machine as m;"
        f"print(json.dumps({{'fp32_flop_per_s': m.measure_fp32({threads}), **m.machine_report()}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def to_markdown(result: dict[str, Any], *, with_operations: bool) -> str:
    """The tables, with what they were measured on."""
    machine = result["machine"]
    lines = [
        f"Stable Diffusion 1.5's configuration with random weights, {result['size']} x "
        f"{result['size']} pixels, {result['threads']} threads ({machine['isa']}; "
        f"{machine['fp32_flop_per_s'] / 1e9:.0f} GFLOP/s in fp32)."
    ]
    for part, rows in result["parts"].items():
        lines += [
            "",
            f"| {PARTS[part]} | seconds | first run | x diffusers | peak memory | error |",
        ]
        lines.append("|---" * 6 + "|")
        base = rows[0]["seconds"]
        for row in rows:
            error = row["largest_difference"]
            lines.append(
                f"| {row['label']} | {row['seconds']:.2f} | {row['first_s']:.2f} | "
                f"{base / row['seconds']:.2f} | {row['peak_rss_bytes'] / 1e9:.2f} GB | "
                f"{'' if error is None else f'{error:.1e}'} |"
            )
        for row in rows if with_operations else []:
            lines += operation_table(row)
    lines += ["", "error: the largest difference from diffusers eager over its largest value."]
    return "\n".join(lines)


def operation_table(row: dict[str, Any]) -> list[str]:
    """Where an engine's last run spent its time."""
    if "operations" not in row:
        return []
    lines = ["", f"| {row['label']}: operation | count | seconds | GFLOP/s |", "|---" * 4 + "|"]
    for kind in sorted(row["operations"], key=lambda kind: -kind["seconds"]):
        rate = kind["operations"] / max(kind["seconds"], 1e-9) / 1e9
        lines.append(f"| {kind['kind']} | {kind['count']} | {kind['seconds']:.3f} | {rate:.0f} |")
    return lines


if __name__ == "__main__":
    main()
