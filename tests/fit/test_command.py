"""`loramix fit`: what it writes, prints and draws, and how it refuses; on a tiny model in a folder."""

import hashlib
import re
import sys
from importlib.metadata import version

import pytest
from reference.adapters import random_adapter
from typer.testing import CliRunner

from merging import load_adapter, save_adapter
from server.cli import app, main
from server.preset_file import read_preset_file

TUNED = ["--share", "adapter", "--lr", "0.1", "--batch", "16"]


def words(place, *more, use="good+bad", data="data.jsonl", out="out.json"):
    given = {"--model": "model", "--adapters": "adapters", "--data": data, "--out": out}
    return ["fit", "--use", use, *(word for option, path in given.items() for word in (option, str(place / path))), *more]


def run(place, *more, **given):
    result = CliRunner().invoke(app, words(place, *more, **given), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_a_preset_is_written_with_what_it_was_made_from(workplace):
    printed = run(workplace, *TUNED).stdout
    preset = read_preset_file(workplace / "out.json")
    weights = {adapter.name: adapter.weight for adapter in preset.recipe.adapters}
    assert preset.recipe.method == "cat"
    assert weights["good"] == pytest.approx(1, abs=0.1)
    assert weights["bad"] == pytest.approx(0, abs=0.1)
    assert preset.adapters == {name: load_adapter(workplace / "adapters" / name).digest for name in ("good", "bad")}
    sha256 = hashlib.sha256((workplace / "data.jsonl").read_bytes()).hexdigest()
    assert preset.fit["data"] == {"sha256": sha256, "rows": 205}
    assert preset.fit["held_out"] == {"sha256": sha256, "rows": 51}
    assert preset.fit["model"] == "model"
    assert preset.fit["options"]["share"] == "adapter"
    assert preset.fit["versions"]["torch"] == version("torch")
    assert preset.fit["improved"]
    assert preset.fit["loss_after"] < preset.fit["loss_before"]
    assert f"{preset.fit['loss_after']:.4f}" in printed
    assert f"{preset.fit['loss_before']:.4f}" in printed
    assert "q_proj" in printed


def test_the_same_seed_gives_the_same_bytes(workplace):
    for name in ("one.json", "other.json"):
        run(workplace, "--epochs", "1", "--lr", "0.1", out=name)
    run(workplace, "--epochs", "1", "--lr", "0.1", "--seed", "1", out="third.json")
    assert (workplace / "one.json").read_bytes() == (workplace / "other.json").read_bytes()
    assert (workplace / "one.json").read_bytes() != (workplace / "third.json").read_bytes()


def test_without_gain_uniform_weights_are_written_and_it_says_so(workplace):
    printed = run(workplace, "--lr", "0").stdout
    preset = read_preset_file(workplace / "out.json")
    assert [adapter.weight for adapter in preset.recipe.adapters] == [0.5, 0.5]
    assert not preset.fit["improved"]
    assert "nothing was better on the held-out rows than weight 0.5 everywhere" in printed


def test_rows_of_another_file_are_judged_on(workplace):
    lines = (workplace / "data.jsonl").read_text().splitlines()
    (workplace / "judge.jsonl").write_text("\n".join(lines[:40]))
    run(workplace, *TUNED, "--epochs", "1", "--held-out", str(workplace / "judge.jsonl"))
    fit = read_preset_file(workplace / "out.json").fit
    assert (fit["data"]["rows"], fit["held_out"]["rows"]) == (256, 40)
    assert fit["held_out"]["sha256"] == hashlib.sha256((workplace / "judge.jsonl").read_bytes()).hexdigest()


def test_another_method_is_searched_and_its_tries_are_printed(workplace):
    printed = run(workplace, "--method", "lego").stdout
    preset = read_preset_file(workplace / "out.json")
    assert preset.recipe.method == "lego"
    assert preset.fit["loss_after"] <= preset.fit["loss_before"]
    assert "norm 2" in printed
    assert printed.count("lego") >= preset.fit["tries"]


def test_long_rows_are_counted_in_a_warning(workplace):
    assert "256 rows are longer than 10 tokens" in run(workplace, *TUNED, "--epochs", "1", "--most-tokens", "10").stderr


def test_the_weights_are_drawn(workplace):
    pytest.importorskip("matplotlib")
    run(workplace, "--epochs", "1", "--plot", str(workplace / "map.png"))
    assert (workplace / "map.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_stands_there_is_replaced_by_force_alone(workplace):
    (workplace / "out.json").write_text("old")
    run(workplace, *TUNED, "--epochs", "1", "--force")
    assert read_preset_file(workplace / "out.json")


REFUSED = {
    "no data": (["--data", "none.jsonl"], "none.jsonl cannot be read"),
    "empty data": (["--data", "empty.jsonl"], "empty.jsonl is empty"),
    "other fields": (["--fields", "question,answer"], "data.jsonl, line 1: no texts 'question' and 'answer'"),
    "one field": (["--fields", "question"], "--fields question: name the prompt and the answer"),
    "too little to hold out": (["--part", "0.001"], "256 rows cannot be split with 0.001"),
    "no model": (["--model", "adapters"], "adapters holds no model"),
    "a broken model": (["--model", "broken"], "broken cannot be loaded"),
    "an unknown adapter": (["--use", "good+bda"], "no adapter 'bda' in adapters; did you mean 'bad'"),
    "an adapter twice": (["--use", "good+good"], "'good' stands twice"),
    "weights": (["--use", "good+bad*0.5"], "name the adapters alone"),
    "an adapter of another model": (["--use", "good+other"], "adapter 'other': this model has no module model.layers.7"),
    "an unknown method": (["--method", "lgeo"], "unknown method 'lgeo'; did you mean 'lego'"),
    "a method for equal ranks": (["--method", "ties"], "equal rank"),
    "an unknown mode": (["--mode", "sotfmax"], "unknown mode 'sotfmax'; did you mean 'softmax'"),
    "an unknown device": (["--device", "gpu"], "device 'gpu' cannot be used here"),
    "a place that is taken": (["--out", "old.json"], "old.json exists; choose another name, or replace it with --force"),
    "a folder": (["--out", "model.json", "--force"], "model.json exists; choose another name"),
    "a name that is none": (["--out", "out.txt"], "out.txt is no name for a preset file; call it out.json"),
    "a place that cannot be": (["--out", "/proc/new.json", "--epochs", "1"], "/proc/new.json cannot be written"),
    "a place for no picture": (["--plot", "map.svg"], "call it map.png"),
    "a fit that diverges": (["--lr", "1e6"], "the fit diverged: .*; use a lower lr"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_with_exit_code_2_and_nothing_written(workplace, monkeypatch, capsys, case):
    (workplace / "empty.jsonl").write_text("\n")
    (workplace / "old.json").write_text("old")
    (workplace / "model.json").mkdir()
    (workplace / "broken").mkdir()
    (workplace / "broken" / "config.json").write_text("{}")
    save_adapter(
        random_adapter(9, 2, alpha=2, shapes={"model.layers.7.mlp.up_proj": (24, 16)}), workplace / "adapters" / "other"
    )
    before = sorted(path.name for path in workplace.iterdir())
    monkeypatch.chdir(workplace)
    bad, says = REFUSED[case]
    plain = [
        "fit",
        "--model",
        "model",
        "--adapters",
        "adapters",
        "--use",
        "good+bad",
        "--data",
        "data.jsonl",
        "--out",
        "new.json",
    ]
    monkeypatch.setattr(sys, "argv", ["loramix", *plain, *bad])  # of an option given twice the last counts
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.fullmatch(rf"loramix: .*{says}.*\n", said), said
    assert sorted(path.name for path in workplace.iterdir()) == before
    assert (workplace / "old.json").read_text() == "old"
