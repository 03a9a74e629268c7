"""Replicas that are real actors of a real Ray Serve, with tests/fake_loramix.py behind each."""

import os
from collections.abc import Iterator

import httpx
import pytest
from replicas_harness import PORT, URL, Deploy, fake_fleet


@pytest.fixture(scope="module")
def ray_up() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray", reason="needs the extra `scale`")
    from ray import serve

    ray.init(address="local", include_dashboard=False, object_store_memory=100 * 2**20, logging_level="ERROR")
    serve.start(proxy_location="HeadOnly", http_options={"port": PORT})
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def deploy(ray_up: None, tmp_path_factory: pytest.TempPathFactory) -> Deploy:
    from ray import serve

    disk = tmp_path_factory.mktemp("disk")

    def begin(replicas: int, *options: str) -> None:
        words = [str(disk), "--served-model-name", "base", "--max-body-mib", "0.1", *options]
        serve.run(fake_fleet(words, replicas), name="loramix")

    return begin


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(base_url=URL, timeout=60) as client:
        yield client
