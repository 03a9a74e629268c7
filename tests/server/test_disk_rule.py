"""The rule of the disk tier: whatever is quicker, by what has been seen."""

from typing import Any

import pytest

from server.disk_rule import Estimates

MERGE, LOAD, READ = ("merged", "svd", 2, 1.0), ("loaded", 100, 1.0), ("read", 100, 0.5)


def seen(*what: tuple[Any, ...]) -> Estimates:
    estimates = Estimates()
    for kind, *values in what:
        getattr(estimates, kind)(*values)
    return estimates


@pytest.mark.parametrize(
    ("what", "source_bytes", "entry_bytes", "reads"),
    [
        ((), 1, 1000, True),  # a restart: its sources have to be read in any case
        ((), 0, 1000, False),
        ((MERGE,), 0, 1, False),  # nothing says how quick the disk is
        ((MERGE,), 1, 1000, True),
        ((LOAD, READ), 0, 1, False),  # nothing says how long the merge takes
        ((("merged", "svd", 3, 9.0), ("merged", "cat", 2, 9.0), LOAD, READ), 0, 1, False),  # merges of another kind say nothing
        ((MERGE, LOAD, READ), 0, 199, True),
        ((MERGE, LOAD, READ), 0, 201, False),
        ((MERGE, LOAD, READ), 100, 399, True),  # a second to load, and one to merge
        ((MERGE, LOAD, READ), 100, 401, False),
        ((MERGE, LOAD), 0, 99, True),  # reads are taken to be as quick as loads
        ((MERGE, LOAD), 0, 101, False),
        ((MERGE, READ), 100, 299, True),  # and loads as reads
        ((MERGE, READ), 100, 301, False),
        ((MERGE, LOAD, READ), 0, 0, True),  # it is in memory
        (((*MERGE[:3], 50.0), MERGE, LOAD, READ), 0, 201, False),  # the shortest counts: the first one compiled something
    ],
)
def test_an_entry_is_asked_for_where_that_is_quicker(
    what: tuple[tuple[Any, ...], ...], source_bytes: int, entry_bytes: int, reads: bool
) -> None:
    assert seen(*what).prefer_entry("svd", 2, source_bytes, entry_bytes) is reads


def test_only_the_last_times_count() -> None:
    quick_once = seen(MERGE, LOAD, READ, *[(*MERGE[:3], 10.0)] * 8)
    assert quick_once.prefer_entry("svd", 2, 0, 1999)


@pytest.mark.parametrize(
    ("what", "build_seconds", "writes"),
    [((), 0.001, True), ((LOAD,), 1.1, True), ((LOAD,), 0.9, False), ((LOAD, READ), 0.6, True), ((LOAD, READ), 0.4, False)],
)
def test_an_entry_is_written_where_reading_it_would_have_been_quicker(
    what: tuple[tuple[Any, ...], ...], build_seconds: float, writes: bool
) -> None:
    assert seen(*what).is_worth_writing(100, build_seconds) is writes
