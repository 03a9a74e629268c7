"""Hypothesis for these tests: the same examples every time, none kept, no limit on slow machines."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "merging", derandomize=True, database=None, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("merging")
