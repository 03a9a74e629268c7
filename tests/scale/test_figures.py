"""The metrics of many on one page."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.scale.figures import one_page


def page(count: int) -> str:
    registry = CollectorRegistry()
    Counter("merges_total", "Merges.", ["method"], registry=registry).labels("cat").inc(count)
    Gauge("leases", "Leases.", registry=registry).set(count)
    Histogram("seconds", "Time.", buckets=(1, 2), registry=registry).observe(count)
    return generate_latest(registry).decode()


def test_every_sample_says_whose_it_is_and_every_family_stands_once() -> None:
    lines = one_page({"a": page(1), "b": page(2)}).decode().splitlines()
    assert lines.count("# TYPE leases gauge") == lines.count("# TYPE merges_total counter") == 1
    for name, count in (("a", 1), ("b", 2)):
        assert f'leases{{replica="{name}"}} {count}.0' in lines
        assert f'merges_total{{method="cat",replica="{name}"}} {count}.0' in lines
        assert f'seconds_sum{{replica="{name}"}} {count}.0' in lines
    assert 'seconds_bucket{le="1.0",replica="b"} 0.0' in lines


def test_none_are_no_lines() -> None:
    assert one_page({}) == b""
