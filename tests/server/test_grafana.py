"""The example dashboard asks for what the server exports, and for nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fuserve.engine.images.stats import ImageStats
from fuserve.engine.stats import EngineStats, StepStats
from fuserve.server.images.metrics import ImageMetrics
from fuserve.server.metrics import ServerMetrics

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana.json"
NAME = re.compile(r"fuserve:\w+")
SELECTOR = re.compile(r"(fuserve:\w+)\{([^}]*)\}")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """The labels of each sample that a server exports."""
    stats = EngineStats(**dict.fromkeys(EngineStats.__dataclass_fields__, 0))
    metrics = ServerMetrics("demo")
    metrics.watch(lambda: stats)
    metrics.on_step(StepStats("mixed", 1, 1, 0.1, 0.01), stats)
    images = ImageMetrics(metrics.registry, "painter")
    image_stats = ImageStats(**dict.fromkeys(ImageStats.__dataclass_fields__, 0))
    images.watch(lambda: image_stats)
    images.on_step("denoise", 0.1)
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def expressions(dashboard: dict[str, Any]) -> list[str]:
    targets = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    return [
        *targets,
        *(v["definition"] for v in dashboard["templating"]["list"] if "query" in v["type"]),
    ]


def test_every_metric_that_it_asks_for_is_exported(
    dashboard: dict[str, Any], exported: dict[str, set[str]]
) -> None:
    asked = {name for text in expressions(dashboard) for name in NAME.findall(text)}
    assert len(asked) >= 15
    assert len([name for name in asked if "image" in name]) >= 9
    assert asked - exported.keys() == set()


def test_every_label_that_it_selects_or_groups_by_is_there(
    dashboard: dict[str, Any], exported: dict[str, set[str]]
) -> None:
    for text in expressions(dashboard):
        selected = [
            (name, label.split("=")[0].rstrip("~!"))
            for name, labels in SELECTOR.findall(text)
            for label in labels.split(",")
        ]
        grouped = [
            label.strip() for by in re.findall(r"by \(([^)]*)\)", text) for label in by.split(",")
        ]
        names = NAME.findall(text)
        for name, label in [*selected, *((names[0], label) for label in grouped)]:
            assert label in exported[name], f"{name} has no label {label!r}"


def test_panels_lie_beside_each_other_and_have_names_of_their_own(
    dashboard: dict[str, Any],
) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert len(set(titles)) == len(titles)


def test_ratios_divide_a_counter_by_what_contains_it(dashboard: dict[str, Any]) -> None:
    ratios = [NAME.findall(text) for text in expressions(dashboard) if ") / " in text]
    for cache in ("prefix_cache", "image_prompt_cache"):
        assert [f"fuserve:{cache}_hits_total", f"fuserve:{cache}_queries_total"] in ratios
