"""The figures of routing: one replica is one replica, and sending equal requests to one place pays."""

import asyncio

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray warns of itself


def test_sessions_find_more_in_slots_than_chance_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="needs the extra `scale`")
    from benchmarks import routing

    monkeypatch.setattr(routing, "REQUESTS", 500)
    alone = [asyncio.run(routing.play(way, 1, 1.1, seed=0)) for way in routing.WAYS]
    assert alone[0] == alone[1] == alone[2]
    session, busy, chance = (asyncio.run(routing.play(way, 4, 1.1, seed=0)) for way in routing.WAYS)
    assert session["hits"] > 1.2 * max(busy["hits"], chance["hits"])
    assert busy["most"] <= session["most"] <= routing.RUNNING / (routing.RUNNING / 2)
    assert session["elsewhere"] < 0.1 < busy["elsewhere"]
