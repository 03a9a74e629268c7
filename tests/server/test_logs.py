"""--log-json: whatever a process says is one JSON object a line, and holds no more than it should."""

import json
import logging
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from server import logs
from server.errors import ConfigError, UnknownModelError
from server.grammar import parse_expression
from server.lease import Lease
from server.request_facts import RequestFacts, begin

ROOT = Path(__file__).parents[2]


def shown(*args: Any, name: str = "vllm.loramix", **how: Any) -> dict[str, Any]:
    """A log call, as its line says it."""
    record = logging.getLogger(name).makeRecord(name, logging.WARNING, "file", 1, args[0], args[1:], how.get("exc_info"))
    record.secret = "of `extra`"
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line
    assert line.isascii()
    assert "secret" not in line
    return dict(json.loads(line))


def test_a_line_says_when_who_and_what() -> None:
    line = shown("%d adapters,\n%s", 3, "grüße \ud800")
    assert line.pop("process") == "MainProcess"
    when = datetime.fromisoformat(line.pop("time"))
    assert when.tzinfo == UTC
    assert abs((datetime.now(UTC) - when).total_seconds()) < 60
    message = "3 adapters,\ngrüße \ud800"
    assert line == {"level": "WARNING", "logger": "vllm.loramix", "pid": os.getpid(), "message": message}


def test_an_exception_is_a_string_and_arguments_that_do_not_fit_are_shown() -> None:
    try:
        raise ValueError("bad")
    except ValueError:
        line = shown("it failed", exc_info=sys.exc_info())
    assert line["exception"].endswith("ValueError: bad")
    assert "Traceback" in line["exception"]
    assert shown("%d", "three")["message"] == "%d ('three',)"


@pytest.fixture
def facts() -> Any:
    facts = RequestFacts("req-1")
    begin(facts)
    yield facts
    begin(None)


ACCESS = ('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "POST", "/v1/completions", "1.1", 200)


def test_lines_of_a_request_have_its_id_and_the_access_line_what_it_asked_for(facts: RequestFacts, catalog: Any) -> None:
    assert shown("x")["request_id"] == "req-1"
    asked = shown(ACCESS[0], *ACCESS[1:3], "/v1/models?api_key=sk-0123", *ACCESS[4:], name="uvicorn.access")
    assert asked["message"] == '1.2.3.4:5 - "POST /v1/models HTTP/1.1" 200'  # no query: it may hold a key
    assert "status" not in shown("x")
    assert shown(*ACCESS, name="uvicorn.access")["status"] == 200
    facts.recipe = recipe = catalog.resolve(parse_expression("math+code", "cat"))
    facts.lease = Lease(recipe.name, recipe.key, "merged", 12.345, end=lambda: None)
    line = shown(*ACCESS, name="uvicorn.access")
    assert (line["recipe"], line["key"], line["cache"], line["wait_ms"]) == (recipe.name, recipe.key, "merged", 12.3)
    facts.error = UnknownModelError("no adapter of that long secret name")
    line = shown(*ACCESS, name="uvicorn.access")
    assert line["error"] == "UnknownModelError"
    assert "that long" not in json.dumps(line)


def lines_of(code: str, **environment: str) -> list[dict[str, Any]]:
    """What a process says on both streams that logs JSON and then runs `code`."""
    setup = "import logging, sys, warnings\nfrom server.logs import to_json\nto_json('INFO')\n"
    done = subprocess.run(
        [sys.executable, "-c", setup + code],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, timeout=120,
    )  # fmt: skip
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_what_is_printed_warned_of_or_not_caught_is_logged() -> None:
    said = lines_of(
        "print('out', 1); print('err', file=sys.stderr); sys.stderr.write(' 1%\\r 2%\\r 3%\\n'); print()\n"
        "warnings.warn('old'); logging.getLogger('other').warning('library'); logging.getLogger('vllm.x').debug('no')\n"
        "sys.stdout.buffer.write(b'raw\\xff\\n'); sys.stdout.flush()\n"
        "raise ValueError('the end')"
    )
    assert [(line["logger"], line["message"].splitlines()[0].split(" UserWarning")[-1]) for line in said] == [
        ("stdout", "out 1"), ("stderr", "err"), ("stderr", "3%"), ("py.warnings", ": old"), ("other", "library"),
        ("stdout", "raw\ufffd"), ("root", "not caught"),
    ]  # fmt: skip
    assert said[-1]["exception"].endswith("ValueError: the end")


def test_a_process_that_it_starts_logs_json_from_its_first_import_and_the_settings_go_with_the_server(tmp_path: Path) -> None:
    said = lines_of(
        "import os, subprocess\n"
        "print(os.environ['VLLM_LOGGING_CONFIG_PATH'])\n"
        "sys.stdout.flush()\n"
        'code = \'import server.cli, logging; logging.getLogger("vllm").info("child"); print("hello")\'\n'
        "subprocess.run([sys.executable, '-c', code], check=True)",
        TMPDIR=str(tmp_path),
    )
    assert [line["message"] for line in said[1:]] == ["child", "hello"]
    assert said[0]["message"].startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_bar_that_redraws_itself_takes_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    bar = logs._Lines("stderr", 2)
    with caplog.at_level(logging.INFO, "stderr"):
        for number in range(1000):
            bar.write(b"\r%d%%" % number)
            assert len(bar._rest) < 10
        bar.write(b"\r")
        bar.write(b"\n")
    assert [record.message for record in caplog.records] == ["999%"]


def test_the_reason_for_not_starting_is_the_last_line() -> None:
    code = "import sys; from server.cli import main; sys.argv = ['loramix', 'serve', '/nowhere', '--log-json']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stderr) == (2, "")
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["level"] == "CRITICAL"
    assert line["message"].startswith("model /nowhere does not exist")


def test_two_ways_to_say_how_to_log_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", "/etc/logging.json")
    with pytest.raises(ConfigError, match=r"--log-json does not go with VLLM_LOGGING_CONFIG_PATH \(/etc/logging.json\)"):
        logs.to_json("INFO")
