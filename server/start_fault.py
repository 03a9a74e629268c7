"""Why vLLM did not come up, as one line: its engine and workers log what they fail with, and the server only learns that they
are gone. So each notes its first error in a file, which the server reads when it has to say why.
"""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merging import LoramixError
from server.errors import ConfigError

_PLACE = "LORAMIX_START_FAULT"  # names the file, to the processes that the server starts


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turns whatever ends the block, a server's whole life, into one line.

    Raises:
        ConfigError: in the place of an Exception, and of a SystemExit that a LoramixError has caused.
    """
    folder = Path(tempfile.mkdtemp(prefix="loramix-start-"))
    os.environ[_PLACE] = str(folder / "fault")
    try:
        yield
    except SystemExit as end:
        if isinstance(end.__cause__, LoramixError):
            raise ConfigError(f"cannot start: {end.__cause__}") from end
        raise
    except Exception as error:  # whatever it is, the server ends of it
        if not isinstance(error, LoramixError | ValueError | OSError | RuntimeError):  # nobody foresaw it: where is it from?
            logging.getLogger("vllm.loramix").error("the server ended", exc_info=error)
        if not folder.exists():
            raise ConfigError(f"the server ended: {first_line(error)}") from error
        noted = folder / "fault"
        raise ConfigError(f"cannot start: {noted.read_text() if noted.exists() else first_line(error)}") from error
    finally:
        started()


def started() -> None:
    """The server is up: what its processes log from now on is no reason for it not to start."""
    if (place := os.environ.get(_PLACE)) is not None:
        shutil.rmtree(Path(place).parent, ignore_errors=True)


def watch() -> None:
    """In a process that a server has started: note the first error that is logged with its exception."""
    place = os.environ.get(_PLACE)
    if place is None:
        return
    make = logging.getLogRecordFactory()

    def noting(*args: Any, **options: Any) -> logging.LogRecord:
        record = make(*args, **options)
        if record.levelno >= logging.ERROR and record.exc_info and record.exc_info[1] is not None:
            with contextlib.suppress(OSError), open(place, "x", encoding="utf-8") as file:  # there already: another was first
                file.write(first_line(record.exc_info[1]))
        return record

    logging.setLogRecordFactory(noting)


def first_line(error: BaseException) -> str:
    """Of pydantic's errors the first, with the name of the setting; of others the first line."""
    errors = error.errors() if callable(getattr(error, "errors", None)) else []  # type: ignore[attr-defined]
    if errors:
        place = ".".join(map(str, errors[0]["loc"]))
        text = (f"{place}: " if place else "") + str(errors[0]["msg"]).removeprefix("Value error, ")
    else:
        text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kind = "" if errors else f"{type(error).__name__}: "
    return kind + (lines[0] if lines else "no reason given")
