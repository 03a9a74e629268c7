"""Every metric of loramix, on the registry that vLLM's /metrics exports."""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """The metrics; one instance a registry.

    Attributes:
        merges: builds by method and outcome (`ok`, `error`).
        merge_seconds: time of a build by method and phase: `load` (sources read), `merge`, `commit` (into the slot).
        cache_requests: look-ups by tier (`device`) and result (`hit`, `miss`).
        evictions: merged adapters that left their slot for another.
        resident: merged adapters in the engine's slots now, by method.
        resident_bytes: bytes of their factors.
        waiting: requests that wait for a build now.
        leases: requests that hold a merged adapter now, waiting ones included.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.merges = Counter("loramix_merges_total", "Builds of merged adapters.", ["method", "outcome"], registry=registry)
        self.merge_seconds = Histogram(
            "loramix_merge_seconds", "Time of a build, by phase.", ["method", "phase"], buckets=_SECONDS, registry=registry
        )
        self.cache_requests = Counter(
            "loramix_cache_requests_total", "Look-ups of merged adapters.", ["tier", "result"], registry=registry
        )
        self.evictions = Counter("loramix_evictions_total", "Merged adapters that left their slot.", registry=registry)
        self.resident = Gauge("loramix_resident_adapters", "Merged adapters in slots.", ["method"], registry=registry)
        self.resident_bytes = Gauge("loramix_resident_bytes", "Bytes of merged adapters in slots.", registry=registry)
        self.waiting = Gauge("loramix_waiting_requests", "Requests that wait for a merge.", registry=registry)
        self.leases = Gauge("loramix_leases", "Leases of merged adapters held by requests.", registry=registry)
