"""`--log-json`: every line of every process is one JSON object.

vLLM reads how to log from a file (VLLM_LOGGING_CONFIG_PATH), in each of its processes; ours names `handler` below. What is
printed past the loggers is made into log lines as well: `sys.stdout` and `sys.stderr` are replaced. What native code writes is
not caught.
"""

import atexit
import io
import json
import logging
import logging.config
import os
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from server.request_facts import current

_PLACE = "VLLM_LOGGING_CONFIG_PATH"
_FOLDER = "loramix-logs-"  # how the names of our folders for that file begin


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON, in ASCII: no message can break the line.

    `time` (UTC), `level`, `logger`, `process`, `pid`, `message`; `request_id` in the lines of a request; `exception`. Lines of
    uvicorn.access also have `status`, and for a request with a recipe `recipe`, `key`, `cache`, `wait_ms`; where it was refused
    `error`, the kind of it. Nothing else of a record or a request is shown.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": getattr(record, "vllm_process_name", record.processName),
            "pid": record.process,
            "message": _message(record),
        }
        if (facts := current()) is not None:
            line["request_id"] = facts.id
        if record.name == "uvicorn.access":
            line |= _of_access(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _message(record: logging.LogRecord) -> str:
    args = record.args
    if record.name == "uvicorn.access" and isinstance(args, tuple) and len(args) == 5:
        args = (*args[:2], str(args[2]).partition("?")[0], *args[3:])  # the path without its query, which may hold a key
    try:
        return str(record.msg) % args if args else str(record.msg)
    except (TypeError, ValueError):  # arguments that do not fit the text
        return f"{record.msg} {args}"


def _of_access(record: logging.LogRecord) -> dict[str, Any]:
    """What the one line that every request has says of it beside uvicorn's message."""
    facts = current()
    shown: dict[str, Any] = {"status": record.args[4]} if isinstance(record.args, tuple) and len(record.args) == 5 else {}
    if facts is not None and facts.recipe is not None:
        shown |= {"recipe": facts.recipe.name, "key": facts.recipe.key}
    if facts is not None and facts.lease is not None:
        shown |= {"cache": facts.lease.tier, "wait_ms": round(facts.lease.waited_ms, 1)}
    if facts is not None and facts.error is not None:
        shown["error"] = type(facts.error).__name__
    return shown


def to_json(level: str) -> None:
    """Have this process, and those that it starts, log JSON to stdout.

    Args:
        level: of vLLM's loggers and ours, by name.

    Raises:
        ConfigError: where the environment says otherwise.
    """
    given = os.environ.get(_PLACE)
    if given and not _is_ours(Path(given)):
        raise ConfigError(f"--log-json does not go with {_PLACE} ({given}); use one of them")
    file = Path(given or tempfile.mkdtemp(prefix=_FOLDER) + "/logging.json")
    if not given:
        atexit.register(shutil.rmtree, file.parent, ignore_errors=True)
    config = _config(level)
    file.write_text(json.dumps(config))
    os.environ[_PLACE] = str(file)
    logging.config.dictConfig(config)


def is_json() -> bool:
    """Whether this process logs JSON."""
    return isinstance(sys.stderr, _Printed)


def join() -> None:
    """Log as the server that has started this process does. For its first imports: vLLM says how to log only after them."""
    file = Path(os.environ.get(_PLACE, ""))
    if _is_ours(file):
        logging.config.dictConfig(json.loads(file.read_text()))


def _is_ours(file: Path) -> bool:
    return file.parent.name.startswith(_FOLDER)


def _config(level: str) -> dict[str, Any]:
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "server.logs.JsonFormatter"}},
        "handlers": {"json": {"()": "server.logs.handler", "formatter": "json"}},
        "root": {"handlers": ["json"], "level": "INFO"},
        "loggers": {"vllm": {"level": level, "propagate": True}},
    }


def handler() -> logging.Handler:
    """The handler, whose making also turns what this process prints into log lines."""
    if not isinstance(sys.stdout, _Printed):
        sys.stdout, sys.stderr = _Printed("stdout", 1), _Printed("stderr", 2)
        logging.captureWarnings(True)
        sys.excepthook = lambda kind, error, trace: logging.critical("not caught", exc_info=(kind, error, trace))
    return _Handler(open(1, "w", encoding="utf-8", closefd=False))  # past sys.stdout, for as long as it runs


class _Handler(logging.StreamHandler[Any]):
    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: a line that cannot be written has nowhere to be complained of."""


class _Printed(io.TextIOWrapper):
    """In the place of `sys.stdout` or `sys.stderr`."""

    def __init__(self, name: str, descriptor: int) -> None:
        super().__init__(io.BufferedWriter(_Lines(name, descriptor)), encoding="utf-8", errors="replace", line_buffering=True)


class _Lines(io.RawIOBase):
    """Logs each line that is written to it under the name of its stream; of a line that redraws itself, the last state."""

    def __init__(self, name: str, descriptor: int) -> None:
        self._logger = logging.getLogger(name)
        self._descriptor = descriptor
        self._rest = b""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: Any) -> int:
        *lines, rest = (self._rest + bytes(data)).split(b"\n")
        self._rest = rest[rest[:-1].rfind(b"\r") + 1 :]  # a bar may redraw itself for ever
        for line in lines:
            if text := line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace").strip():
                self._logger.info("%s", text)
        return len(data)
