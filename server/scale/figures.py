"""The metrics of all replicas as one page: every sample with the label `replica`."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class _All(Collector):
    def __init__(self, pages: Mapping[str, str]) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for replica, page in self._pages.items():
            for family in text_string_to_metric_families(page):
                same = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                labelled = (sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples)
                same.samples.extend(labelled)
        return families.values()


def one_page(pages: Mapping[str, str]) -> bytes:
    """Prometheus' text format, from the same of each replica by its name."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_All(pages))
    return generate_latest(registry)
