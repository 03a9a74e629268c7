"""`loramix merge`, `inspect` and `explain`: what they write and print, and how they refuse."""

import json

import pytest
import torch
from reference.adapters import random_adapter
from typer.testing import CliRunner

from merging import LoraAdapter, LoramixError, LoraModule, load_adapter, save_adapter
from merging.errors import OutputError
from server.cli import app


@pytest.fixture
def folder(tmp_path):
    for name, rank, seed in (("math", 4, 1), ("code", 4, 2), ("style", 2, 3)):
        modules = {n: LoraModule(m.a, m.b) for n, m in random_adapter(seed, rank).modules.items()}
        save_adapter(LoraAdapter(modules, "tiny"), tmp_path / "adapters" / name)
    return tmp_path


def run(folder, command, *words):
    result = CliRunner().invoke(app, [command, *map(str, words), "--adapters", str(folder / "adapters")])
    if isinstance(result.exception, LoramixError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_merge_writes_a_folder_that_loads_again(folder):
    summary = json.loads(run(folder, "merge", "lego-4(math*0.7+code)", "--out", folder / "out", "--json"))
    assert load_adapter(folder / "out").digest == summary["digest"]
    assert summary["rank"] == 4


def test_an_existing_folder_is_kept_unless_forced_and_then_replaced_whole(folder):
    run(folder, "merge", "cat(math)", "--out", folder / "out")
    before = load_adapter(folder / "out").digest
    with pytest.raises(OutputError, match="--force"):
        run(folder, "merge", "cat(code)", "--out", folder / "out")
    assert load_adapter(folder / "out").digest == before
    run(folder, "merge", "cat(code)", "--out", folder / "out", "--force")
    assert load_adapter(folder / "out").digest != before
    assert sorted(path.name for path in folder.iterdir()) == ["adapters", "out"]


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("merging.peft_folder.save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        run(folder, "merge", "cat(math)", "--out", folder / "out")
    assert [path.name for path in folder.iterdir()] == ["adapters"]


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("tise(math)", "did you mean 'ties'"),
        ("lego-99(math+code)", "use 8 or less"),
        ("ties-1.5(math+code)", r"outside \(0, 1\]"),
        ("ties(math+style)", "core-ties"),
        ("cat(mth)", "did you mean 'math'"),
        ('{"method": "cat", "adapters": [{"name": "math", "weight": NaN}]}', "finite"),
        ('{"method": "lego", "adapters": [{"name": "math"}], "options": {"nrom": "2"}}', "did you mean 'norm'"),
    ],
)
def test_a_bad_recipe_is_refused_with_a_remedy(folder, recipe, says):
    with pytest.raises(LoramixError, match=says):
        run(folder, "merge", recipe, "--out", folder / "out")
    assert not (folder / "out").exists()


def test_inspect_says_which_methods_can(folder):
    paths = [str(folder / "adapters" / name) for name in ("math", "style")]
    seen = json.loads(CliRunner().invoke(app, ["inspect", *paths, "--json"]).stdout)
    assert seen["methods"]["svd"] is None
    assert "equal rank" in seen["methods"]["ties"]
    fact = seen["adapters"][paths[0]]
    adapter = load_adapter(paths[0])
    squares = [torch.linalg.norm(m.delta()) ** 2 for name, m in adapter.modules.items() if name.endswith("q_proj")]
    assert fact["norms"]["q_proj"] == pytest.approx(float(sum(squares) / len(squares)) ** 0.5, rel=1e-5)
    assert fact["rank"] == 4


def test_explain_of_an_exact_sum_keeps_everything(folder):
    told = json.loads(run(folder, "explain", "cat(math+style)", "--json"))
    assert {name: round(values["energy"], 4) for name, values in told["total"].items()} == {"math": 1.0, "style": 1.0}


def test_explain_draws(folder):
    pytest.importorskip("matplotlib")
    run(folder, "explain", "lego(math+code)", "--plot", folder / "map.png")
    assert (folder / "map.png").read_bytes().startswith(b"\x89PNG")
