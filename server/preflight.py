"""What can be known to be wrong before the model is loaded, or vLLM even imported: said in one line, in a second."""

import errno
import os
import socket
import tempfile
from pathlib import Path

from server.errors import ConfigError

# Trouble of the disk itself, which costs time only (see server/disk_cache.py), while the server runs as when it starts.
_TROUBLE = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO)


def check_model(model: str) -> None:
    """Raises ConfigError for a path that is no model's; names on the Hub and URLs are left to vLLM."""
    path = Path(model).expanduser()
    if not path.exists():
        if model.startswith((".", "/", "~")):
            raise ConfigError(f"model {model} does not exist; give a model's folder, or ORG/NAME on the Hub")
    elif path.is_dir() and not any((path / name).is_file() for name in ("config.json", "params.json")):
        raise ConfigError(f"model {model} is a folder without config.json; give the folder that has a model's files in it")


def check_cache_dir(folder: Path) -> None:
    """Raises ConfigError where nothing can ever be written; makes the folder if it is missing, for this user alone."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno not in _TROUBLE:
            raise ConfigError(
                f"--cache-dir {folder} cannot be written ({error.strerror}); give a folder of your own"
            ) from error


def check_memory(host_bytes: int) -> None:
    """Raises ConfigError where source adapters are to take more host memory than the machine has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if host_bytes > total:
        raise ConfigError(f"--adapter-host-gib {host_bytes / 2**30:g} is over this machine's {total / 2**30:.0f} GiB; use less")


def check_port(host: str | None, port: int) -> None:
    """Raises ConfigError where the server could not listen."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port {port} is no port; use 1 to 65535")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"--host {host} is no address to listen on ({error.strerror}); give one of this machine's") from error
    family, kind, protocol, _, address = addresses[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
        try:
            probe.bind(address)
        except OSError as error:
            remedy = "give another --port" if error.errno == errno.EADDRINUSE else "give another --host or --port"
            raise ConfigError(f"cannot listen on {address[0]}:{port} ({error.strerror}); {remedy}") from error


def check_slots(slots: int, fewest: int) -> None:
    """Raises ConfigError for fewer LoRA slots than serving takes."""
    if slots < fewest:
        raise ConfigError(f"--max-loras {slots} is too few; use {fewest} or more" + (" on the CPU" if fewest > 1 else ""))
