"""Settings as `loramix serve` hands them to the plugin: through the environment."""

import json
from pathlib import Path

import pytest

from server.config import Settings


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
