"""Reports from workers' threads to the server's event loop."""

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest_asyncio

from server.disk_metrics import Figures
from server.reports import Report, Reporter, Reports


class Ends:
    """The server's end, and as many workers' as are asked for."""

    def __init__(self) -> None:
        self.figures: list[Figures] = []
        self.reports = Reports(self.figures.append)
        self.reporters: list[Reporter] = []

    def worker(self) -> Reporter:
        self.reporters.append(Reporter(self.reports.address))
        return self.reporters[-1]


@pytest_asyncio.fixture
async def ends() -> AsyncIterator[Ends]:
    ends = Ends()
    yield ends
    ends.reports.close()
    for reporter in ends.reporters:
        reporter.close()


def report(lora_id: int, merge: float = 0.5) -> Report:
    return Report(
        lora_id=lora_id,
        state="done",
        fault=None,
        seconds={"merge": merge},
        tiers={"disk": 1},
        disk=None,
        used_bytes={"host": 9},
    )


async def test_a_merge_has_ended_once_every_worker_has_said_so(ends: Ends) -> None:
    reports = ends.reports
    one, other = ends.worker(), ends.worker()
    ended, later = reports.expect(1, workers=2), reports.expect(2, workers=2)
    one.send(report(1, merge=0.25))
    one.send(report(2))
    await asyncio.sleep(0.05)
    assert not ended.done()
    other.send(report(1, merge=0.75))
    received = await asyncio.wait_for(ended, 10)
    assert sorted(each["seconds"]["merge"] for each in received) == [0.25, 0.75]
    assert all(each["tiers"] == {"disk": 1} for each in received)
    assert not later.done()


async def test_figures_come_between_reports(ends: Ends) -> None:
    reporter, ended = ends.worker(), ends.reports.expect(1, workers=1)
    figures = Figures(worker=3, families=[("name", "text", "gauge", [("name", {"kind": "a"}, 1.5)])])
    reporter.send(figures)
    reporter.send(report(1))
    await asyncio.wait_for(ended, 10)
    assert ends.figures == [json.loads(json.dumps(figures))]


async def test_what_nobody_expects_is_passed_over(ends: Ends) -> None:
    reports = ends.reports
    reporter = ends.worker()
    gone, expected = reports.expect(1, workers=1), reports.expect(2, workers=1)
    reports.forget(1)
    for lora_id in (1, 77, 2):
        reporter.send(report(lora_id))
    await asyncio.wait_for(expected, 10)
    assert not gone.done()


async def test_many_threads_of_a_worker_may_report_at_once(ends: Ends) -> None:
    reports = ends.reports
    reporter = ends.worker()
    expected = [reports.expect(lora_id, workers=1) for lora_id in range(200)]
    with ThreadPoolExecutor(8) as threads:
        await asyncio.get_running_loop().run_in_executor(
            None, lambda: list(threads.map(reporter.send, map(report, range(200))))
        )
    received = await asyncio.wait_for(asyncio.gather(*expected), 10)
    assert [each["lora_id"] for (each,) in received] == list(range(200))


async def test_the_socket_lies_in_a_folder_of_the_users_own_which_goes_with_it(ends: Ends) -> None:
    reports = ends.reports
    folder = Path(reports.address.removeprefix("ipc://")).parent
    assert folder.stat().st_mode & 0o077 == 0
    reports.close()
    assert not folder.exists()


async def test_sending_never_waits_for_a_server_that_is_gone(ends: Ends) -> None:
    reports = ends.reports
    reporter = ends.worker()
    reports.close()
    for lora_id in range(5000):
        reporter.send(report(lora_id))
