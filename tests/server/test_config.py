"""Settings as `loramix serve` hands them to the plugin: through the environment."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.config import Settings
from server.errors import ConfigError


@pytest.mark.parametrize("cache_dir", [None, Path("/somewhere"), Path("null")])
def test_no_folder_for_the_disk_cache_is_told_from_any_folder(monkeypatch: pytest.MonkeyPatch, cache_dir: Path | None) -> None:
    value = Settings(cache_dir=cache_dir and cache_dir.absolute(), cache_disk_gib=0.5).model_dump(mode="json")
    for name in ("cache_dir", "cache_disk_gib"):
        text = value[name] if isinstance(value[name], str) else json.dumps(value[name])
        monkeypatch.setenv(f"LORAMIX_{name.upper()}", text)
    assert Settings().cache_dir == (cache_dir and cache_dir.absolute())
    assert Settings().cache_disk_bytes == 2**29


def test_the_keys_file_reaches_the_plugin_and_keys_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMIX_API_KEY", "sk-0123456789-abc")
    monkeypatch.setenv("LORAMIX_ADMIN_KEY", "sk-9876543210-abc")
    assert Settings().keys_file is None
    assert "sk-" not in repr(Settings())
    monkeypatch.setenv("LORAMIX_KEYS_FILE", "/run/keys.toml")
    assert Settings().keys_file == Path("/run/keys.toml")


BAD = [
    ("merge_queue", 0), ("merge_queue", -1), ("cold_merges_per_minute", 0), ("max_adapters_per_recipe", 0),
    ("max_adapters_per_recipe", 17), ("max_body_mib", 0), ("max_body_mib", -1.5), ("max_body_mib", float("inf")),
    ("merge_timeout", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_setting_that_cannot_be_is_named_as_option_and_as_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    option = f"--{name.replace('_', '-')}"
    wanted = rf"{option} \(LORAMIX_{name.upper()}\): input should be .* \(got '?{value:g}'?\)"
    with pytest.raises(ConfigError, match=wanted):
        Settings.read(**{name: value})
    with pytest.raises(ConfigError, match=option):
        raise CliRunner().invoke(app, ["serve", "model", option, f"{value:g}"]).exception or AssertionError("it went on")
    monkeypatch.setenv(f"LORAMIX_{name.upper()}", f"{value:g}")
    with pytest.raises(ConfigError, match=wanted):
        Settings.read()


def test_a_default_method_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"--default-method \(LORAMIX_DEFAULT_METHOD\): no merge method .* did you mean 'lego'"
    ):
        Settings.read(default_method="legos")


def test_limits_reach_the_plugin_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"merge_queue": 3, "cold_merges_per_minute": None, "max_adapters_per_recipe": 2, "max_body_mib": 0.5}
    for name, value in Settings.read(**given).model_dump(mode="json", include=set(given)).items():
        monkeypatch.setenv(f"LORAMIX_{name.upper()}", json.dumps(value))
    settings = Settings.read()
    assert {name: getattr(settings, name) for name in given} == given
    assert settings.max_body_bytes == 2**19
    monkeypatch.setenv("LORAMIX_COLD_MERGES_PER_MINUTE", "5")
    assert Settings.read().cold_merges_per_minute == 5
