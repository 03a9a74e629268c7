"""Why a server did not start: the first cause, wherever it was, as one line."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from merging import LoramixError
from server import start_fault
from server.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _undone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LORAMIX_START_FAULT", "")
    monkeypatch.delenv("LORAMIX_START_FAULT")
    factory = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(factory)


def child(code: str) -> None:
    """What one of vLLM's processes does, which the server's command has started."""
    setup = "import logging\nfrom server import start_fault\nstart_fault.watch()\n"
    subprocess.run([sys.executable, "-c", setup + code], check=True, cwd=ROOT, capture_output=True)


FAIL = "try:\n    raise {}\nexcept Exception:\n    logging.getLogger('any').exception('it failed')\n"


@start_fault.told()
def engine_that_fails() -> None:
    child("logging.error('harmless')\n" + FAIL.format("ValueError('\\n no such architecture\\n see below')"))
    child(FAIL.format("Exception('a worker has failed')"))
    raise RuntimeError("Engine core initialization failed. See root cause above.")


@start_fault.told()
def server_that_dies_later() -> None:
    start_fault.started()
    child(FAIL.format("ValueError('of a request')"))
    raise RuntimeError("the engine died")


def test_the_first_error_of_any_process_is_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"^cannot start: ValueError: no such architecture$"):
        engine_that_fails()


def test_without_one_it_is_what_ended_the_server() -> None:
    with pytest.raises(ConfigError, match=r"^cannot start: OSError: \[Errno 5\] broken$"), start_fault.told():
        raise OSError(5, "broken")


def test_of_pydantics_errors_it_is_the_first_with_its_setting() -> None:
    class Config(BaseModel):
        max_loras: int

    with pytest.raises(ConfigError, match=r"^cannot start: max_loras: Input should be a valid integer"), start_fault.told():
        Config(max_loras="x")  # type: ignore[arg-type]


def test_what_loramix_refuses_is_said_as_it_is() -> None:
    with pytest.raises(ConfigError, match=r"^cannot start: a broken adapter$"), start_fault.told():
        raise SystemExit("loramix: cannot start: a broken adapter") from LoramixError("a broken adapter")
    with pytest.raises(SystemExit), start_fault.told():
        raise SystemExit(3)


def test_once_it_is_up_errors_of_requests_are_no_reason() -> None:
    with pytest.raises(ConfigError, match=r"^the server ended: RuntimeError: the engine died$"):
        server_that_dies_later()


def test_what_nobody_foresaw_is_logged_with_its_place(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"^cannot start: ZeroDivisionError: division by zero$"), start_fault.told():
        1 / 0  # noqa: B018
    assert caplog.records[-1].exc_info is not None


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_fault.tempfile, "tempdir", str(tmp_path))
    with start_fault.told():
        assert Path(os.environ["LORAMIX_START_FAULT"]).parent.is_dir()
    assert list(tmp_path.iterdir()) == []
