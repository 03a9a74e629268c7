"""`loramix merge`, `inspect` and `explain`: what they write and print, and how they refuse."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from reference.adapters import random_adapter
from typer.testing import CliRunner

import merging.peft_folder
from merging import LoraAdapter, LoramixError, LoraModule, load_adapter, save_adapter
from merging.errors import OutputError
from server.cli import app, main

Q = "model.layers.0.self_attn.q_proj"


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


@pytest.mark.parametrize("place", ["notes", "notes/file"])
def test_nothing_but_an_adapter_is_replaced_by_force(folder, place):
    (folder / "notes").mkdir()
    (folder / "notes/file").write_text("keep")
    with pytest.raises(OutputError, match="is no adapter, which is all that --force replaces"):
        run(folder, "merge", "cat(math)", "--out", folder / place, "--force")
    assert (folder / "notes/file").read_text() == "keep"
    assert sorted(path.name for path in folder.iterdir()) == ["adapters", "notes"]


def test_a_link_to_an_adapter_stays_a_link_to_the_new_one(folder):
    run(folder, "merge", "cat(math)", "--out", folder / "out")
    (folder / "link").symlink_to("out")
    run(folder, "merge", "cat(code)", "--out", folder / "link", "--force")
    assert (folder / "link").is_symlink()
    assert load_adapter(folder / "out").digest == load_adapter(folder / "link").digest
    assert sorted(path.name for path in folder.iterdir()) == ["adapters", "link", "out"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_result_has_the_dtype_that_was_asked_for(folder, dtype):
    run(folder, "merge", "svd-2(math+style)", "--out", folder / "out", "--dtype", dtype)
    assert {str(module.a.dtype) for module in load_adapter(folder / "out").modules.values()} == {f"torch.{dtype}"}


def test_a_disk_that_is_full_gives_one_line_and_leaves_what_was_there(folder):
    """A process that may write 512 bytes to a file, as the system sees it; the adapter has 2 kB."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512)); from server.cli import main; main()"
    run(folder, "merge", "cat(math)", "--out", folder / "old")
    before = load_adapter(folder / "old").digest
    for words in (["--out", "new"], ["--out", "old", "--force"]):
        ended = subprocess.run(
            [sys.executable, "-c", limited, "merge", "cat(math+code)", "--adapters", "adapters", *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 2, ended.stderr
        assert "File too large" in ended.stderr
        assert ended.stderr.count("\n") == 1
        assert sorted(path.name for path in folder.iterdir()) == ["adapters", "old"]
    assert load_adapter(folder / "old").digest == before


def test_an_interrupted_merge_leaves_nothing_and_no_traceback(folder, monkeypatch, capsys):
    def half(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(merging.peft_folder, "save_file", half)
    code, said = ended(monkeypatch, capsys, "merge", "cat(math)", "--adapters", folder / "adapters", "--out", folder / "out")
    assert code == 130
    assert "Traceback" not in said
    assert [path.name for path in folder.iterdir()] == ["adapters"]


def ended(monkeypatch, capsys, *words):
    """What the command as people call it exits with, and what it says on stderr."""
    monkeypatch.setattr(sys, "argv", ["loramix", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["merge", "lgeo(math+code)", "--out", "new"], None),  # an expression's error points at the place, on lines of its own
        (["merge", "cat-2(math)", "--out", "new"], "cat takes no number"),
        (["merge", "lego-9(math+code)", "--out", "new"], "rank 9 is over 8.*use 8 or less"),
        (["merge", "svd-0(math+code)", "--out", "new"], "rank 0 of svd; use 1 or more"),
        (["merge", "ties-0(math+code)", "--out", "new"], r"density 0 of ties is outside \(0, 1\]"),
        (["merge", "core-ties-1.1(math+code)", "--out", "new"], r"density 1.1 of core-ties is outside \(0, 1\]"),
        (["merge", '{"adapters": [{"name": "math", "weight": NaN}]}', "--out", "new"], "weight nan of 'math'"),
        (["merge", '{"adapters": [{"name": "math", "wieght": 1}]}', "--out", "new"], "wieght"),
        (["merge", '{"adapters": [}', "--out", "new"], "the recipe is no JSON"),
        (["merge", "cat(math+other)", "--out", "new"], f"shape of {Q}.*different base models"),
        (["merge", "cat(math)", "--out", "adapters/math"], "adapters/math exists; choose another.*--force"),
        (["merge", "cat(math)", "--out", "new", "--dtype", "float61"], "did you mean 'float16'"),
        (["merge", "cat(math)", "--out", "new", "--device", "gpu"], "device 'gpu' cannot be used here.*use cpu"),
        (["merge", "cat(math)", "--out", "/proc/new"], "/proc/new cannot be written.*choose another folder"),
        (["explain", "cat(math)", "--plot", "map.svg"], "call it map.png"),
        (["explain", "cat(math)", "--plot", "nowhere/map.png"], "no folder nowhere for map.png"),
        (["explain", "cat(math+cdoe)"], "did you mean 'code'"),
        (["inspect", "nowhere"], "adapter nowhere: no such folder; check the path"),
    ],
)
def test_bad_input_is_one_line_with_a_remedy_and_exit_code_2(folder, monkeypatch, capsys, command, says):
    save_adapter(random_adapter(9, 2, alpha=2, shapes={Q: (14, 16)}), folder / "adapters/other")
    monkeypatch.chdir(folder)
    code, said = ended(monkeypatch, capsys, *command, *([] if command[0] == "inspect" else ["--adapters", "adapters"]))
    assert code == 2
    if says is None:
        assert said == "loramix: unknown method 'lgeo'; did you mean 'lego'?\n  lgeo(math+code)\n  ^\n"
    else:
        assert re.search(f"^loramix: .*{says}.*\n$", said), said
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


def test_inspect_of_adapters_of_different_models_names_the_module_and_no_method(folder):
    save_adapter(random_adapter(9, 4, alpha=4, shapes={Q: (14, 16)}), folder / "adapters/other")
    paths = [str(folder / "adapters" / name) for name in ("math", "other")]
    seen = json.loads(CliRunner().invoke(app, ["inspect", *paths, "--json"]).stdout)
    assert all(f"shape of {Q}" in verdict for verdict in seen["methods"].values())
    printed = CliRunner().invoke(app, ["inspect", *paths]).stdout
    assert "can be merged by: no method" in printed
    assert printed.count("different base models") == 1


def test_inspect_prints_whole_numbers_and_every_target(folder):
    printed = CliRunner().invoke(app, ["inspect", str(folder / "adapters/math")]).stdout
    adapter = load_adapter(folder / "adapters/math")
    numbers = sum(module.a.numel() + module.b.numel() for module in adapter.modules.values())
    for fact in (f"{numbers:,}", "float32", adapter.digest[:12], "tiny", "q_proj", "up_proj", "down_proj"):
        assert fact in printed


def test_explain_prints_each_kind_and_layer(folder):
    told = json.loads(run(folder, "explain", "lego(math+style)", "--json"))
    printed = run(folder, "explain", "lego(math+style)")
    for words in ("q_proj", "up_proj", "down_proj", "layer 0", "layer 1", "all"):
        assert words in printed
    overall = " ".join(printed.partition(" all ")[2].replace("│", " ").split())
    for name in ("math", "style"):
        assert " ".join([name, *(f"{value:.2f}" for value in told["total"][name].values())]) in overall


def test_explain_of_an_exact_sum_keeps_everything(folder):
    told = json.loads(run(folder, "explain", "cat(math+style)", "--json"))
    assert {name: round(values["energy"], 4) for name, values in told["total"].items()} == {"math": 1.0, "style": 1.0}


def test_explain_draws(folder):
    pytest.importorskip("matplotlib")
    run(folder, "explain", "lego(math+code)", "--plot", folder / "map.png")
    assert (folder / "map.png").read_bytes().startswith(b"\x89PNG")
