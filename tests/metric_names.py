"""The names of all of loramix's metrics, as queries use them."""

from prometheus_client import CollectorRegistry

from server.disk_metrics import DiskMetrics
from server.metrics import Metrics

_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def our_metrics() -> set[str]:
    registry = CollectorRegistry()
    Metrics(registry), DiskMetrics(registry)
    return {family.name + suffix for family in registry.collect() for suffix in _SUFFIXES[family.type]}
