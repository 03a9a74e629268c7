"""What is refused before vLLM is imported, and that nothing else is."""

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from server import preflight
from server.errors import ConfigError


@pytest.mark.parametrize("model", ["/nowhere/model", "./nowhere", "../nowhere", "~/nowhere-at-all"])
def test_a_path_to_nothing_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match=f"model {model} does not exist"):
        preflight.check_model(model)


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder without config\.json"):
        preflight.check_model(str(tmp_path))
    (tmp_path / "config.json").touch()
    preflight.check_model(str(tmp_path))


@pytest.mark.parametrize("model", ["gpt2", "org/name", "s3://bucket/model", "org/name:Q4_K_M"])
def test_names_and_urls_are_left_to_vllm(model: str) -> None:
    preflight.check_model(model)


def test_a_model_may_be_one_file_or_have_mistrals_config(tmp_path: Path) -> None:
    (tmp_path / "params.json").touch()
    preflight.check_model(str(tmp_path))
    preflight.check_model(str(tmp_path / "params.json"))  # as a GGUF file is


def test_a_cache_folder_is_made_for_this_user_alone_and_left_empty(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    preflight.check_cache_dir(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.iterdir()) == []


def test_a_cache_folder_that_can_never_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(ConfigError, match=f"--cache-dir {folder} cannot be written"):
            preflight.check_cache_dir(folder)

    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(preflight.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        preflight.check_cache_dir(tmp_path)


@pytest.mark.parametrize("kind", [errno.EROFS, errno.ENOSPC, errno.EIO])
def test_a_disk_in_trouble_costs_time_and_stops_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    def fail(**_: object) -> None:
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(preflight.tempfile, "TemporaryFile", fail)
    preflight.check_cache_dir(tmp_path)


def test_a_port_in_use_is_refused_and_a_free_one_is_not_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port} .*; give another --port"):
            preflight.check_port("127.0.0.1", port)
    for _ in range(2):
        preflight.check_port("127.0.0.1", port)
    preflight.check_port(None, port)


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 8000), ("192.0.2.1", 8000), ("127.0.0.1", 70000)])
def test_an_address_that_is_not_this_machines_is_refused(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match="70000 is no port" if port == 70000 else host):
        preflight.check_port(host, port)


def test_more_host_memory_than_there_is_is_refused() -> None:
    preflight.check_memory(4 * 2**30)
    with pytest.raises(ConfigError, match=r"--adapter-host-gib 1e\+06 is over this machine's \d+ GiB"):
        preflight.check_memory(10**6 * 2**30)


def test_too_few_slots_are_refused_with_the_fewest() -> None:
    preflight.check_slots(1, fewest=1)
    with pytest.raises(ConfigError, match=r"--max-loras 0 is too few; use 1 or more$"):
        preflight.check_slots(0, fewest=1)
    with pytest.raises(ConfigError, match="--max-loras 1 is too few; use 2 or more on the CPU"):
        preflight.check_slots(1, fewest=2)
