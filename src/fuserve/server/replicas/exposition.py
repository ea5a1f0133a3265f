"""The metrics of several replicas as one page of Prometheus' text format."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from fuserve.server.metrics import PREFIX


def merged(pages: Mapping[str, bytes], ready: int, wanted: int) -> bytes:
    """One page; each sample says which replica it is of.

    Args:
        pages: by the replica's name.
        ready: replicas that take requests.
        wanted: replicas that there should be.
    """
    families: dict[str, Metric] = {}
    for replica, page in pages.items():
        for family in text_string_to_metric_families(page.decode()):
            known = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                labels = sample.labels | {"replica": replica}
                known.add_sample(
                    sample.name, labels, sample.value, sample.timestamp, sample.exemplar
                )
    for name, help, value in (
        (PREFIX + "replicas_ready", "Replicas that take requests.", ready),
        (PREFIX + "replicas", "Replicas that there should be.", wanted),
    ):
        families[name] = gauge = Metric(name, help, "gauge")
        gauge.add_sample(name, {}, value)
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: Mapping[str, Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return list(self._families.values())
