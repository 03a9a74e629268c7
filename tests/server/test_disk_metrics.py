"""The disk cache's figures, from the workers that count them to the registry that is exported."""

import json
from pathlib import Path

from disk_harness import KEYS, Cache
from prometheus_client import CollectorRegistry, generate_latest

from server.disk_metrics import WorkerFigures, figures_of


def test_the_latest_figures_of_every_worker_are_shown_as_they_were_counted(tmp_path: Path) -> None:
    shown, exported = WorkerFigures(), CollectorRegistry()
    exported.register(shown)
    assert generate_latest(exported) == b""
    caches = [Cache(tmp_path), Cache(tmp_path)]
    for _ in range(2):
        for worker, cache in enumerate(caches):
            cache.cache.read(KEYS[0])
            shown.take(json.loads(json.dumps(figures_of(worker, cache.registry))))  # they travel as JSON
    caches[0].write(KEYS[0])
    shown.take(figures_of(0, caches[0].registry))
    value = exported.get_sample_value
    assert [value("loramix_disk_reads_total", {"result": "miss", "worker": worker}) for worker in "01"] == [2, 2]
    assert value("loramix_disk_entries", {"worker": "0"}) == 1
    assert value("loramix_disk_seconds_count", {"operation": "write", "worker": "0"}) == 1
    for family, kind in (("reads_total", "counter"), ("seconds", "histogram"), ("bytes", "gauge")):
        assert generate_latest(exported).count(f"# TYPE loramix_disk_{family} {kind}\n".encode()) == 1
    for cache in caches:
        cache.cache.close()
