"""Every metric of loramix, on the registry that vLLM's /metrics exports."""

from collections.abc import Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from merging import LoramixError
from server.engine import Resident
from server.errors import refusal_of

REASONS = ("rate", "queue", "deadline", "draining", "engine", "memory", "body", "recipe")
"""Why requests are refused; server/errors.py says which error counts as what."""

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """The metrics; one instance a registry.

    Attributes:
        merges: builds by method and outcome: `ok`, `error`, `oom` (no device memory), `dropped` (nobody waited any more),
            `refused` (the line was too long).
        merge_seconds: time of a build by method and phase: `commit` (in the engine's thread, which decodes nothing meanwhile),
            `queue` (for a helper thread), `disk` (all that came of looking in the disk cache), `load` (sources from disk),
            `copy` (sources to where merges read), `merge`.
        commit_seconds_max: the longest `commit` so far.
        source_requests: source adapters that merges asked for, by where they were: `device`, `host`, `disk`.
        source_bytes: what source adapters take up in the memory of each tier.
        cache_requests: look-ups by tier (`device`; on a miss there, `disk`, where that may be quicker than merging) and result
            (`hit`, `miss`).
        evictions: merged adapters that left their slot, for another or because they were told to.
        resident: merged adapters in the engine's slots now, by method.
        resident_bytes: bytes of these slots.
        waiting: requests that wait for a build now.
        leases: requests that hold a merged adapter now, waiting ones included.
        line: builds that wait for a slot now.
        adapters, presets: that requests can name now.
        refused: requests refused, by reason: `rate` (new merges of one client), `queue` (builds in line), `deadline`,
            `draining` (the server stops), `engine` (it has died), `memory` (of the device), `body` (its size), `recipe` (a
            limit on recipes).
        first_token: time to the first token of a streamed answer, by kind (`base`, `adapter`, `composition`) and where its
            merged adapter came from (`device`, `disk`, `merged`; `none` for the base model).

    Counters with few and known labels begin at 0: Prometheus does not see a counter grow that appears with its first event.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._longest_commit = 0.0
        self.merges = Counter("loramix_merges_total", "Builds of merged adapters.", ["method", "outcome"], registry=registry)
        self.merge_seconds = Histogram(
            "loramix_merge_seconds", "Time of a build, by phase.", ["method", "phase"], buckets=_SECONDS, registry=registry
        )
        self.commit_seconds_max = Gauge(
            "loramix_commit_seconds_max", "Longest time that a build has kept the engine's thread.", registry=registry
        )
        self.source_requests = Counter(
            "loramix_source_requests_total", "Source adapters by where they were found.", ["tier"], registry=registry
        )
        self.source_bytes = Gauge("loramix_source_bytes", "Bytes of source adapters in memory.", ["tier"], registry=registry)
        self.cache_requests = Counter(
            "loramix_cache_requests_total", "Look-ups of merged adapters.", ["tier", "result"], registry=registry
        )
        self.evictions = Counter("loramix_evictions_total", "Merged adapters that left their slot.", registry=registry)
        self.resident = Gauge("loramix_resident_adapters", "Merged adapters in slots.", ["method"], registry=registry)
        self.resident_bytes = Gauge("loramix_resident_bytes", "Bytes of merged adapters in slots.", registry=registry)
        self.waiting = Gauge("loramix_waiting_requests", "Requests that wait for a merge.", registry=registry)
        self.leases = Gauge("loramix_leases", "Leases of merged adapters held by requests.", registry=registry)
        self.line = Gauge("loramix_merge_queue_length", "Builds that wait for a slot.", registry=registry)
        self.adapters = Gauge("loramix_adapters", "Adapters that requests can name.", registry=registry)
        self.presets = Gauge("loramix_presets", "Presets that requests can name.", registry=registry)
        self.refused = Counter("loramix_refused_total", "Requests refused, by reason.", ["reason"], registry=registry)
        self.first_token = Histogram(
            "loramix_first_token_seconds", "Time to first token.", ["kind", "tier"], buckets=_SECONDS, registry=registry
        )
        for reason in REASONS:
            self.refused.labels(reason=reason)
        for tier in ("device", "host", "disk"):
            self.source_requests.labels(tier=tier)
        for tier in ("device", "disk"):
            for result in ("hit", "miss"):
                self.cache_requests.labels(tier=tier, result=result)

    def count_refusal(self, error: LoramixError) -> None:
        """Count an answer, if it is a refusal; most errors are not."""
        if (reason := refusal_of(error)) is not None:
            self.refused.labels(reason=reason).inc()

    def add(self, resident: Resident) -> None:
        """Count a merged adapter that has been built into a slot."""
        method = resident.recipe.spec.method.name
        for phase, seconds in resident.seconds.items():
            self.merge_seconds.labels(method=method, phase=phase).observe(seconds)
        self._longest_commit = max(self._longest_commit, resident.seconds["commit"])
        self.commit_seconds_max.set(self._longest_commit)
        if resident.disk is not None:
            self.cache_requests.labels(tier="disk", result=resident.disk).inc()
        for tier, count in resident.sources.items():
            self.source_requests.labels(tier=tier).inc(count)
        self.show_source_bytes(resident.source_bytes)
        self.resident.labels(method=method).inc()
        self.resident_bytes.inc(resident.nbytes)

    def show_source_bytes(self, used_bytes: Mapping[str, int]) -> None:
        """Say what source adapters take up now, by tier."""
        for tier, nbytes in used_bytes.items():
            self.source_bytes.labels(tier=tier).set(nbytes)

    def remove(self, resident: Resident) -> None:
        """Count one that leaves its slot."""
        self.evictions.inc()
        self.resident.labels(method=resident.recipe.spec.method.name).dec()
        self.resident_bytes.dec(resident.nbytes)
