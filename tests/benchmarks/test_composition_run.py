"""The study from end to end on a tiny model: it stops, goes on, and says what is wrong in a line."""

import dataclasses
import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from skills import DataError

from benchmarks.composition import __main__, record
from benchmarks.composition.groups import groups
from benchmarks.composition.run import Options, _side_by_side, left, run
from benchmarks.composition.study import FULL, PAIRS, QUICK, SETS
from benchmarks.composition.work import StudyError, Work
from merging import METHODS
from server import cli

SIZES = dataclasses.replace(QUICK, pairs=("sum+pirate",), sets=("three",), length=96, scales=(1.0,), effort=0.01)
pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`")


@pytest.fixture
def options(data_folder, model_folder, tmp_path) -> Options:
    return Options(data_folder, model_folder, tmp_path / "work", torch.device("cpu"), SIZES, math.inf, "command")


@pytest.fixture(scope="module")
def finished(data_folder, model_folder, tmp_path_factory) -> Work:
    """A run that was not stopped."""
    folder = tmp_path_factory.mktemp("finished")
    return run(Options(data_folder, model_folder, folder, torch.device("cpu"), SIZES, math.inf, "command"), silent)


def silent(line: str) -> None:
    pass


def scores(work: Work) -> dict[str, object]:
    return {f"{group.key} {row.name}": work.score(0, group, row) for group in groups(SIZES) for row in group.rows}


def test_a_run_judges_every_row(finished) -> None:
    assert left(finished, SIZES) == 0
    figures = record.record(finished, SIZES)["figures"]
    rows = (*METHODS, "cat-free", "union", "target", "best-single")
    assert {f"skills.sum+pirate.{row}.mean" for row in rows} <= figures.keys()
    assert all(0 <= value <= 100 for name, value in figures.items() if name.startswith("skills.") and name.endswith(".mean"))


def test_a_stopped_run_goes_on_to_the_same_scores(options, finished) -> None:
    stopped = run(dataclasses.replace(options, seconds=0), silent)
    assert left(stopped, SIZES) == sum(len(group.rows) for group in groups(SIZES))
    lines: list[str] = []
    assert scores(run(options, lines.append)) == scores(finished)
    assert any("trained pirate" in line for line in lines)


def copy_without(finished: Work, folder: Path, score: str) -> None:
    """A run that has everything but one score."""
    shutil.copytree(finished.folder, folder)
    path = folder / "seed-0" / "scores.json"
    kept = json.loads(path.read_text())
    del kept[score]
    path.write_text(json.dumps(kept))


def test_only_what_is_missing_is_made_again(options, finished) -> None:
    copy_without(finished, options.work, "skills.sum+pirate lego")
    lines: list[str] = []
    assert scores(run(options, lines.append)) == scores(finished)
    assert not [line for line in lines if "train" in line or "learned" in line]


def test_adapters_that_are_gone_are_trained_again_for_what_is_left_to_judge(options, finished) -> None:
    copy_without(finished, options.work, "tasks.three cat")
    shutil.rmtree(options.work / "seed-0" / "adapters")
    lines: list[str] = []
    assert scores(run(options, lines.append)) == scores(finished)
    assert {line.rpartition(" ")[2] for line in lines if "trained" in line} == {"plural", "letter", "opposite"}


def test_seeds_side_by_side_come_to_the_scores_of_one_process(options, finished, capfd) -> None:
    both = dataclasses.replace(options, sizes=dataclasses.replace(SIZES, seeds=2))
    Work(both.work, {"benchmark": "composition"}, both.sizes)
    _side_by_side(both, (0, 1), print)
    done = Work(both.work, {}, both.sizes)
    assert left(done, both.sizes) == 0
    assert scores(done) == scores(finished)
    assert {"seed 0", "seed 1"} <= {line.partition("] ")[2].partition(":")[0] for line in capfd.readouterr().out.splitlines()}


def test_what_a_seed_raises_is_raised_for_all(options) -> None:
    both = dataclasses.replace(options, data=options.work, sizes=dataclasses.replace(SIZES, seeds=2))
    Work(both.work, {}, both.sizes)
    with pytest.raises(DataError, match="instruction-induction"):
        _side_by_side(both, (0, 1), print)


def test_the_time_of_all_calls_is_counted(options) -> None:
    first = run(dataclasses.replace(options, seconds=0), silent).wall_seconds
    assert 0 < first < run(options, silent).wall_seconds


def test_a_folder_of_other_sizes_is_refused(options) -> None:
    run(dataclasses.replace(options, seconds=0), silent)
    with pytest.raises(StudyError, match="with other sizes; choose another --work"):
        run(dataclasses.replace(options, sizes=dataclasses.replace(SIZES, seeds=2)), silent)


@pytest.mark.parametrize(
    ("main", "name"),
    [(__main__.main, ["composition"]), (cli.main, ["loramix", "bench", "composition"])],
    ids=["module", "loramix"],
)
def test_a_data_folder_without_data_is_one_line_before_anything_is_trained(
    model_folder, tmp_path, monkeypatch, capsys, main, name
) -> None:
    given = {"--data": "nowhere", "--model": str(model_folder), "--work": str(tmp_path / "w"), "--device": "cpu"}
    monkeypatch.setattr(sys, "argv", [*name, "--quick", *itertools.chain(*given.items())])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line]
    assert line.startswith("loramix: no nowhere/instruction-induction/")
    assert "fetch github.com/orhonovich" in line
    assert not list(Path(tmp_path / "w").glob("seed-*"))


def test_every_method_is_a_row_of_every_pair_and_of_the_set_of_one_rank() -> None:
    by_key = {group.key: [row.name for row in group.rows] for group in groups(FULL)}
    for key, rows in by_key.items():
        expected = {"cat", "svd", "lego", "core-ties", "tsv", "iso"} if key == "tasks.mixed-ranks" else set(METHODS)
        assert expected <= set(rows)
        assert {"base", "cat-free", "cat-softmax", "cat-random", "union"} <= set(rows)
        assert len(set(rows)) == len(rows)
    assert set(by_key["tasks.mixed-ranks"]).isdisjoint({"linear", "ties", "dare", "magnitude"})
    assert {f"lego-{k}" for k in (2, 64)} <= set(by_key["tasks.rank-8"])


def test_every_adapter_that_a_row_needs_is_trained() -> None:
    everything = dataclasses.replace(FULL, pairs=tuple(PAIRS), sets=tuple(SETS))
    for group in groups(everything):
        trained = {job.name for job in group.jobs}
        assert {name for row in group.rows for name in row.adapters} <= trained
        assert {name for job in group.jobs for name in job.scaffolds} <= trained


def test_a_name_stands_for_one_training() -> None:
    jobs = {}
    for job in (job for group in groups(FULL) for job in group.jobs):
        assert jobs.setdefault(job.name, job) == job


def test_no_form_is_trained_on_what_it_is_asked_with() -> None:
    for content, other in PAIRS.values():
        if other.form.opening:
            assert not set(content.tasks) & set(other.tasks)
            assert not set(content.tasks) & set(other.scaffolds)
