"""Keys of a running server: whose key is it that a request brings?"""

import argparse
import hashlib
import hmac
import logging
import os
import stat
import time
from pathlib import Path

from server.caller import Caller
from server.config import Settings
from server.errors import ConfigError
from server.keys_file import VARIABLES, read_keys

logger = logging.getLogger("vllm.loramix")  # below vLLM's logger, so that lines look and go like its own

_LOOK_SECONDS = 1.0  # between two looks whether the file has changed


class Keys:
    """The keys of a running server. A keys file that changes is read again; one that has become bad is logged, and what it said
    before still holds.

    Args:
        path: the keys file, if there is one.

    Raises:
        ConfigError: see read_keys.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._version, self._looked = self._look(), time.monotonic()
        self._keys = read_keys(path)
        if path is not None and path.stat().st_mode & stat.S_IROTH:
            logger.warning("keys file %s can be read by everybody on this machine; chmod 600 it", path)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def has_admin(self) -> bool:
        return any(key.caller.admin for key in self._keys)

    def find(self, secret: bytes) -> Caller | None:
        """Who holds `secret`. Compares with all keys, in the same time whether and where one agrees."""
        self._refresh()
        digest, found = hashlib.sha256(secret).digest(), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key.caller
        return found

    def _refresh(self) -> None:
        if self._path is None or time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        version, self._looked = self._look(), time.monotonic()
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = read_keys(self._path)
            logger.info("keys file %s was read again: %d keys", self._path, len(self._keys))
        except ConfigError as error:
            logger.error("keys are kept as they were: %s", error)

    def _look(self) -> tuple[int, ...] | None:
        """What changes with the file; None where it is not there."""
        try:
            status = self._path.stat() if self._path is not None else None
        except OSError:
            return None
        return status and (status.st_mtime_ns, status.st_size, status.st_ino)


def refuse_vllms_keys(args: argparse.Namespace) -> None:
    """vLLM's own keys would shut out the holders of ours. Raises ConfigError where both are given."""
    theirs = "--api-key" if getattr(args, "api_key", None) else "VLLM_API_KEY" if os.environ.get("VLLM_API_KEY") else None
    ours = "--keys-file" if Settings.read().keys_file else next((name for name in VARIABLES if name in os.environ), None)
    if theirs and ours:
        raise ConfigError(f"{theirs} is vLLM's own and does not go with {ours}; move its key there, and leave {theirs} out")
