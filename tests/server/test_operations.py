"""docs/operations.md names every metric there is, and none that there is not."""

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from server import errors
from server.disk_metrics import DiskMetrics
from server.metrics import REASONS, Metrics

TEXT = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def metrics() -> dict[str, str]:
    """Type by the name that a query uses."""
    registry = CollectorRegistry()
    Metrics(registry), DiskMetrics(registry)
    return {family.name + ("_total" if family.type == "counter" else ""): family.type for family in registry.collect()}


def test_every_metric_is_explained_and_every_one_explained_exists() -> None:
    assert set(re.findall(r"\bloramix_[a-z_]+", TEXT)) == set(metrics())


def test_refusals_are_named_as_they_are_counted() -> None:
    raised = [
        errors.RateLimitedError("", 1), errors.OverloadedError(""), errors.OutOfMemoryError(""), errors.DrainingError(""),
        errors.EngineDiedError(""), errors.BusyError(""), errors.TooLargeError(""), errors.LimitError("", "rank"),
    ]  # fmt: skip
    row = next(line for line in TEXT.splitlines() if line.startswith("| `loramix_refused_total"))
    assert {errors.refusal_of(error) for error in raised} == set(re.findall(r"`([a-z]+)`", row)) == set(REASONS)
