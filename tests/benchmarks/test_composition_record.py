"""Figures of the study from scores: what is chosen on what, and relative to what."""

import dataclasses
import json

import pytest

from benchmarks.composition import record
from benchmarks.composition.groups import Group, groups
from benchmarks.composition.plots import draw
from benchmarks.composition.study import QUICK
from benchmarks.composition.tables import tables
from benchmarks.composition.work import Work

SIZES = dataclasses.replace(QUICK, seeds=2, scales=(0.5, 1.0, 2.0))
HEAD = {"benchmark": "composition", "hardware": "a GPU", "date": "2026-01-02"}


@pytest.fixture
def work(tmp_path) -> Work:
    """Every row 10 % right, those of the second seed 20 %."""
    work = Work(tmp_path, HEAD, SIZES)
    work.spent(0, "train", 61.2)
    for group in groups(SIZES):
        for seed in range(SIZES.seeds):
            for row in group.rows:
                percent = [10.0 + 10 * seed] * len(row.asked or group.asked)
                scales = SIZES.scales if row.adapters else (1.0,)
                work.keep_score(seed, group, row, {str(scale): {"validation": percent, "test": percent} for scale in scales})
    return work


def put(work: Work, group: Group, name: str, seed: int, by_scale: dict[float, tuple[list[float], list[float]]]) -> None:
    row = next(row for row in group.rows if row.name == name)
    score = {str(scale): {"validation": validation, "test": test} for scale, (validation, test) in by_scale.items()}
    work.keep_score(seed, group, row, score)


def test_the_scale_is_chosen_on_validation_items_and_told_by_the_test(work) -> None:
    pair, _ = groups(SIZES)
    put(work, pair, "cat", 0, {0.5: ([80.0], [30.0]), 1.0: ([40.0], [90.0]), 2.0: ([0.0], [0.0])})
    put(work, pair, "cat", 1, {0.5: ([10.0], [0.0]), 1.0: ([10.0], [50.0]), 2.0: ([5.0], [40.0])})
    figures = record.record(work, SIZES)["figures"]
    key = "skills.plural+json-alone.cat"
    assert figures[f"{key}.mean"] == 40.0  # 30 at 0.5, and 50 at 1: of equal scales the one nearest to 1
    assert figures[f"{key}.std"] == pytest.approx(14.14, abs=0.01)
    assert figures[f"{key}.scale"] == 0.75
    assert (figures[f"{key}.lowest"], figures[f"{key}.highest"]) == (15.0, 70.0)  # of the means at 0.5 and at 1


def test_a_set_is_relative_to_what_each_own_adapter_gets_right_as_trained(work) -> None:
    _, three = groups(SIZES)
    for adapter, right in {"plural": [80.0, 5.0, 5.0], "letter": [0.0, 50.0, 0.0], "opposite": [9.0, 9.0, 0.0]}.items():
        put(work, three, adapter, 0, dict.fromkeys(SIZES.scales, (right, right)))
    put(work, three, "lego", 0, dict.fromkeys(SIZES.scales, ([40.0, 50.0, 30.0], [40.0, 50.0, 30.0])))
    figures = record.record(work, SIZES)["figures"]
    assert figures["tasks.three.own-plural.mean"] == 50.0  # with 20 % of the second seed
    assert figures["tasks.three.lego.mean"] == pytest.approx((75 + 100) / 2)  # `opposite` alone is never right: left out


def test_the_best_single_adapter_is_chosen_on_validation_items(work) -> None:
    pair, _ = groups(SIZES)
    for seed in range(2):
        put(work, pair, "plural", seed, dict.fromkeys(SIZES.scales, ([30.0], [1.0])))
        put(work, pair, "json-alone", seed, dict.fromkeys(SIZES.scales, ([20.0], [2.0])))
        put(work, pair, "union", seed, dict.fromkeys(SIZES.scales, ([90.0], [91.0])))
    figures = record.record(work, SIZES)["figures"]
    assert figures["skills.plural+json-alone.best-single.mean"] == 1.0
    assert figures["skills.plural+json-alone.union.mean"] == 91.0


def test_one_seed_has_no_deviation(work) -> None:
    figures = record.record(work, dataclasses.replace(SIZES, seeds=1))["figures"]
    assert figures["tasks.three.cat.mean"] == 100.0
    assert not [name for name in figures if name.endswith(".std")]


def test_the_record_says_what_made_it_and_is_read_back_as_written(work, tmp_path) -> None:
    found = record.record(work, SIZES)
    record.save(found, tmp_path / "results" / "composition.json")
    back = json.loads((tmp_path / "results" / "composition.json").read_text())
    assert back == json.loads(json.dumps(found))
    assert back["hardware"] == "a GPU"
    assert back["seconds"] == {"train": 61}
    assert back["series"]["skills.plural+json-alone"]["base"] == [[1.0, 15.0]]


def test_tables_have_a_row_for_every_method(work) -> None:
    text = tables(record.record(work, SIZES))
    assert "| lego | 15.0 ± 7.1 |" in text  # the pair
    assert "| lego | 100.0 ± 0.0 |" in text  # the set
    assert "| cat-target | 15.0 ± 7.1 |" in text


def test_plots_are_drawn(work, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    paths = draw(record.record(work, SIZES), tmp_path / "composition")
    assert [path.name for path in paths] == ["composition-scales.png", "composition-ranks.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)
