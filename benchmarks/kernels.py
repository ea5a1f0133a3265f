"""How near does each kernel come to the machine's limit, and to torch's own operator?

For every kernel and shape: our rate, the ceiling that applies, measured in the same run, the
fraction of it, and the same work by torch with as many threads. Kernels take turns, and the median
is reported. Operands are copied until they do not fit into the caches, as a model's weights do not.
Lines that begin with CLAIM are figures the project promises. Writes JSON.

    python benchmarks/kernels.py --quick
    python benchmarks/kernels.py --sections linear,attention --threads 2
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from kernel_cases.attentions import measure_attention
from kernel_cases.contexts import measure_contexts
from kernel_cases.convs import measure_convs, measure_integer_convs
from kernel_cases.linears import measure_linears
from kernel_cases.measure import Ceilings, Claim, Effort, Row
from kernel_cases.norms import measure_norms
from kernel_cases.overheads import measure_overheads

from fuserve.kernels.machine import machine_report, num_threads

RESULTS = Path(__file__).resolve().parent / "results"
SECTIONS = {  # those of one thread set torch to one thread
    "linear": (measure_linears, False),
    "attention": (measure_attention, True),
    "norm": (measure_norms, True),
    "conv": (measure_convs, False),
    "int8_conv": (measure_integer_convs, False),
    "context": (measure_contexts, False),
    "overhead": (measure_overheads, False),
}


def main() -> None:
    """Measure, print while measuring, write."""
    given = parse_arguments()
    effort = Effort(given.threads, given.rounds, given.turn_ms / 1e3)
    ceilings = Ceilings.measure(given.threads)
    machine = machine_report() | {"num_threads": given.threads}
    print_machine(machine, ceilings)
    rows: list[Row] = []
    claims: list[Claim] = []
    for name in given.sections.split(","):
        section, one_thread = SECTIONS[name]
        torch.set_num_threads(1 if one_thread else given.threads)
        print(f"\n{name}\n{HEADER}", flush=True)
        for result in section(effort, given.quick):
            if isinstance(result, Claim):
                claims.append(result)
            else:
                rows.append(result)
                print(line(result), flush=True)
    print("\n" + "\n".join(map(str, claims)))
    write(
        given.output,
        {
            "machine": machine,
            "ceilings": asdict(ceilings),
            "quick": given.quick,
            "rounds": given.rounds,
            "torch": torch.__version__,
            "rows": [
                asdict(row) | {"fraction": row.fraction, "peer_ratio": row.peer_ratio}
                for row in rows
            ],
            "claims": [asdict(claim) for claim in claims],
        },
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few kernels and shapes, few rounds")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="of " + ", ".join(SECTIONS))
    parser.add_argument("--threads", type=int, default=num_threads())
    parser.add_argument("--rounds", type=int, help="turns of each kernel; 7, or 3 if --quick")
    parser.add_argument("--turn-ms", type=float, default=20.0, help="length of a turn, at least")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.json")
    given = parser.parse_args()
    unknown = set(given.sections.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    if given.rounds is None:
        given.rounds = 3 if given.quick else 7
    return given


def print_machine(machine: dict[str, Any], ceilings: Ceilings) -> None:
    """What was measured on, and what bounds it."""
    print(
        f"{machine['cpu']}, {machine['isa']}, {machine['num_threads']} threads: reads "
        f"{ceilings.read_bytes_per_s / 1e9:.1f} GB/s, fp32 {ceilings.fp32_op_per_s / 1e9:.0f}, "
        f"int8 dot {ceilings.int8_dot_op_per_s / 1e9:.0f}, "
        f"int4 dot {ceilings.int4_dot_op_per_s / 1e9:.0f}, "
        f"row dot {ceilings.row_dot_op_per_s / 1e9:.0f} GOP/s"
    )


HEADER = (
    f"{'kernel':43} {'shape':18} {'case':14} {'time':>10} {'rate':>13} {'ceiling':>17} "
    f"{'':>5}  {'torch':>10} {'x torch':>7}"
)


def line(row: Row) -> str:
    """A row of the table."""
    ceiling = "" if row.ceiling is None else f"{row.bound} {row.ceiling:.1f}"
    fraction = "" if row.fraction is None else f"{row.fraction:.0%}"
    text = (
        f"{row.kernel:43} {row.shape:18} {row.case:14} {milliseconds(row.seconds):>10} "
        f"{row.rate:>7.1f} {row.unit:5} {ceiling:>17} {fraction:>5}"
    )
    if row.peer_seconds is None or row.peer_ratio is None:
        return text
    return f"{text}  {milliseconds(row.peer_seconds):>10} {row.peer_ratio:>7.2f} {row.peer}"


def milliseconds(seconds: float) -> str:
    """A time with three decimals."""
    return f"{seconds * 1e3:.3f} ms"


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
