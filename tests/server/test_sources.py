"""Where adapters and presets come from, as the settings name them."""

from pathlib import Path

import pytest
from harness import tiny_adapter

from merging import AdapterError, save_adapter
from merging.peft_folder import read_adapter
from server.catalog import Catalog
from server.commands.serve import _pairs, _survey
from server.config import Settings
from server.errors import ConfigError
from server.presets import read_presets
from server.sources import adapter_folders
from server.survey import survey


def test_every_visible_subfolder_of_an_adapters_folder_is_an_adapter(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "README.md").write_text("not a folder")
    assert list(adapter_folders(Settings(adapters=[tmp_path]))) == [("a", tmp_path / "a"), ("b", tmp_path / "b")]


def test_a_single_adapter_has_the_name_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "long-name").mkdir()
    assert list(adapter_folders(Settings(adapter={"short": str(tmp_path / "long-name")}))) == [
        ("short", tmp_path / "long-name")
    ]


def test_an_adapters_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path / 'none'} does not exist"):
        list(adapter_folders(Settings(adapters=[tmp_path / "none"])))


def test_a_hub_repository_that_cannot_be_had_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        AdapterError, match=r"'x': the Hub did not give no-such-org/no-such-adapter \(.+\); nor is .* a folder here"
    ):
        list(adapter_folders(Settings(adapter={"x": "no-such-org/no-such-adapter"})))


def test_settings_come_from_the_environment_as_from_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAMIX_ADAPTERS", f'["{tmp_path}"]')
    monkeypatch.setenv("LORAMIX_PRESETS", '{"tutor": "math+code"}')
    monkeypatch.setenv("LORAMIX_SKIP_BAD_ADAPTERS", "true")
    settings = Settings()
    assert (settings.adapters, settings.presets, settings.skip_bad_adapters) == ([tmp_path], {"tutor": "math+code"}, True)


def test_name_value_options_are_read_and_their_mistakes_named() -> None:
    assert _pairs("--preset", ["a=cat(x*2)", "b=y=z"]) == {"a": "cat(x*2)", "b": "y=z"}
    for words, message in ((["a"], "write it as NAME=VALUE"), (["=x"], "NAME=VALUE"), (["a=1", "a=2"], "a is given twice")):
        with pytest.raises(ConfigError, match=message):
            _pairs("--preset", words)


def test_before_the_model_is_loaded_ranks_and_targets_are_read_and_broken_adapters_refused(tmp_path: Path) -> None:
    save_adapter(tiny_adapter(4, seed=0), tmp_path / "good")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"adapter_config.json is missing.*--skip-bad-adapters"):
        _survey(Settings(adapters=[tmp_path]))
    assert _survey(Settings(adapters=[tmp_path], skip_bad_adapters=True)) == ([4], {"q_proj", "down_proj"})


def test_a_preset_is_a_recipe_with_a_name(catalog: Catalog) -> None:
    (preset,) = read_presets({"tutor": "lego-4(math+code)"}, catalog, "cat").values()
    assert catalog.resolve(preset.spec).spec == preset.spec


@pytest.mark.parametrize(
    ("name", "recipe", "reason"),
    [
        ("math", "code", "taken by an adapter"),
        ("tiny", "code", "or the base model"),
        ("a b", "code", "letters, digits"),
        ("tutor", "math+cod", "did you mean 'code'"),
        ("tutor", "cat(math", r"expected '\)'"),
        ("tutor", "cat(math+code+style)", "--max-lora-rank"),
    ],
)
def test_a_preset_that_cannot_be_served_stops_the_start(catalog: Catalog, name: str, recipe: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        read_presets({name: recipe}, catalog, "cat")
    assert repr(name) in str(raised.value)


def test_an_adapter_is_read_once_until_its_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    monkeypatch.setattr("server.survey.read_adapter", lambda folder: (reads.append(folder), read_adapter(folder))[1])
    save_adapter(tiny_adapter(4, seed=0), tmp_path / "a")
    first = survey(tmp_path / "a")
    assert survey(tmp_path / "a") is first
    save_adapter(tiny_adapter(2, seed=1), tmp_path / "a", replace=True)
    assert survey(tmp_path / "a").rank == 2
    assert len(reads) == 2
