"""The disk cache's metrics."""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class DiskMetrics:
    """The metrics; one instance a registry.

    Attributes:
        reads: by result: `hit`, `miss`, `corrupt` (removed, and merged again), `error`, `paused` (not asked, see DiskCache).
        writes: by outcome: `written`, `present` (it was there already), `dropped` (too many were waiting), `error`.
        errors: by operation (`open`, `read`, `touch`, `write`, `list`, `remove`) and kind (see DiskCache).
        seconds: time of a hit's read and of an entry's writing, by operation.
        evictions: entries that this server evicted for new ones.
        entries, nbytes: what the folder held when this server last wrote to it.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
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
