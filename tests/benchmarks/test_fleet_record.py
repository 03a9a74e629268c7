"""The record, and what docs/scaling.md says of it."""

import dataclasses
import json
from pathlib import Path

import pytest

import benchmarks.fleet
from benchmarks.fleet import rule, start
from benchmarks.fleet.bench import save
from benchmarks.fleet.costs import Costs, read_costs
from benchmarks.fleet.plots import draw
from benchmarks.fleet.start import Counts
from benchmarks.fleet.study import FULL, QUICK, measured, scenarios
from benchmarks.fleet.tables import by_title

ROOT = Path(benchmarks.fleet.__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks" / "results" / "fleet.json").read_text())
FIGURES = RECORD["figures"]
COSTS = Costs(**FIGURES["costs"])


@pytest.mark.parametrize("title", by_title(RECORD))
def test_the_document_shows_every_table_of_the_record(title) -> None:
    assert by_title(RECORD)[title] in (ROOT / "docs" / "scaling.md").read_text()


def test_the_record_has_every_scenario_with_the_costs_that_are_measured_today() -> None:
    assert {scenario.name for scenario in scenarios(FULL)} <= set(FIGURES)
    today = read_costs(ROOT / "benchmarks" / "results", FIGURES["start"]["read_ms"] / 1e3)
    assert dataclasses.asdict(COSTS) == pytest.approx(dataclasses.asdict(today), rel=1e-4)


@pytest.mark.parametrize("seed", [0, 4])
def test_a_scenario_that_is_simulated_again_says_what_the_record_says(seed) -> None:
    scenario = measured(seed)
    assert scenario.run(COSTS) == pytest.approx(FIGURES[scenario.name], rel=1e-3)


def test_the_real_server_found_things_where_the_simulation_does_within_five_points() -> None:
    """Its throughput and first tokens are too good, and the document says so."""
    real = FIGURES["real"]
    for name in ("hit_rate", "sources_device_share", "sources_host_share"):
        assert real[f"{name}.mean"] == pytest.approx(real[f"{name}.measured"], abs=0.05)


def test_a_quick_run_has_the_same_scenarios_where_it_has_the_same_fleets() -> None:
    quick, full = ({s.name for s in scenarios(sizes)} for sizes in (QUICK, FULL))
    assert quick < full
    assert all(name.startswith("fleet.") for name in full - quick)


def test_plots_are_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    paths = draw(RECORD, tmp_path / "fleet")
    assert [path.name for path in paths] == ["fleet-hits.png", "fleet-load.png", "fleet-large.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_a_record_is_read_back_as_written_a_scenario_on_each_line(tmp_path) -> None:
    save(RECORD, tmp_path / "new" / "fleet.json")
    text = (tmp_path / "new" / "fleet.json").read_text()
    assert json.loads(text) == RECORD
    assert sum('": {"' in line for line in text.splitlines()) == len(FIGURES)


def test_reading_and_checking_are_measured_with_the_servers_code(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(start, "_FULL", start._SMALL)
    figures = start.measure(Counts(full=1, small=4), tmp_path)
    assert set(figures) == set(FIGURES["start"])
    assert all(value > 0 for value in figures.values())
    assert 10 < figures["catalog_kib"] < 200  # 224 names of modules, twice


def test_the_rule_of_thumb_is_bounded_by_seats_and_by_reading() -> None:
    warm = rule.load(COSTS, 128, hits=1.0, reads=4)
    assert warm == rule.SEATS_USED
    cold = rule.load(COSTS, 128, hits=0.0, reads=4)
    assert cold * COSTS.capacity(128) * (COSTS.merge_seconds + 4 * COSTS.read_seconds) == pytest.approx(1.0)  # one of two
    assert cold < rule.load(COSTS, 128, hits=0.5, reads=4) < warm
