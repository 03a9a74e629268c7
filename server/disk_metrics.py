"""The disk cache's metrics: counted in the workers, shown by the API process."""

from collections.abc import Iterator
from typing import TypedDict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class DiskMetrics:
    """The metrics; one instance a registry.

    Attributes:
        reads: by result: `hit`, `miss`, `corrupt` (removed, and merged again), `error`, `paused` (not asked, see DiskCache).
        writes: by outcome: `written`, `present` (it was there already), `dropped` (too many were waiting), `left` (its slot was
            given away before it had been copied), `error`.
        errors: by operation (`open`, `read`, `touch`, `copy`, `write`, `list`, `remove`) and kind (see DiskCache).
        seconds: time of a hit's read and of an entry's writing, by operation.
        evictions: entries that this server evicted for new ones.
        entries, nbytes: what the folder held when this server last wrote to it.

    Reads and writes begin at 0, or Prometheus would not see the first of each kind.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.reads = Counter("loramix_disk_reads_total", "Look-ups in the disk cache.", ["result"], registry=registry)
        self.writes = Counter("loramix_disk_writes_total", "Entries for the disk cache.", ["outcome"], registry=registry)
        self.errors = Counter(
            "loramix_disk_errors_total", "What the disk cache's disk refused.", ["operation", "kind"], registry=registry
        )
        self.seconds = Histogram(
            "loramix_disk_seconds", "Time to read or write an entry.", ["operation"], buckets=_SECONDS, registry=registry
        )
        self.evictions = Counter("loramix_disk_evictions_total", "Entries that left the disk cache.", registry=registry)
        self.entries = Gauge("loramix_disk_entries", "Entries of the disk cache.", registry=registry)
        self.nbytes = Gauge("loramix_disk_bytes", "Bytes of the disk cache.", registry=registry)
        for result in ("hit", "miss", "corrupt", "error", "paused"):
            self.reads.labels(result=result)
        for outcome in ("written", "present", "dropped", "left", "error"):
            self.writes.labels(outcome=outcome)


class Figures(TypedDict):
    """All metrics of one worker's registry, in plain values.

    families: [name, documentation, type, [[sample's name, labels, value], …]] each.
    """

    worker: int
    families: list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]


def figures_of(worker: int, registry: CollectorRegistry) -> Figures:
    return Figures(worker=worker, families=[_plain(family) for family in registry.collect()])


def _plain(family: Metric) -> tuple[str, str, str, list[tuple[str, dict[str, str], float]]]:
    samples = [(sample.name, sample.labels, sample.value) for sample in family.samples]
    return family.name, family.documentation, family.type, samples


class WorkerFigures(Collector):
    """Shows the latest figures of each worker, with the label `worker` added."""

    def __init__(self) -> None:
        self._latest: dict[int, Figures] = {}

    def take(self, figures: Figures) -> None:
        self._latest[figures["worker"]] = figures

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for worker, figures in sorted(self._latest.items()):
            for name, documentation, kind, samples in figures["families"]:
                family = families.setdefault(name, Metric(name, documentation, kind))
                for sample, labels, value in samples:
                    family.add_sample(sample, {**labels, "worker": str(worker)}, value)
        yield from families.values()
