"""The keys that a server knows: from a keys file, and from the environment.

The file is TOML, one table a key:

    [[key]]
    name = "team-a"               # what logs and metrics call its holder
    key = "…"                     # or sha256 = "…", the key's digest in hex; or env = "VARIABLE", which holds the key
    adapters = ["math-*", "code"] # may be left out: every adapter
    admin = false                 # may be left out

LORAMIX_API_KEY and LORAMIX_ADMIN_KEY are one key each, named `default` and `admin`. Only digests are kept, and no message shows
a key.
"""

import hashlib
import os
import re
import tomllib
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from server.caller import Caller
from server.errors import ConfigError

MIN_LENGTH = 16  # characters of a key
VARIABLES = {"LORAMIX_API_KEY": Caller("default"), "LORAMIX_ADMIN_KEY": Caller("admin", admin=True)}


class KeyEntry(BaseModel):
    """One key of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    key: SecretStr | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$", repr=False)
    env: str | None = None
    adapters: list[str] = Field(default=["*"])
    admin: bool = False

    @model_validator(mode="after")
    def _clear(self) -> "KeyEntry":
        if sum(value is not None for value in (self.key, self.sha256, self.env)) != 1:
            raise ValueError("give one of key, sha256 and env")
        if self.admin and self.adapters != ["*"]:
            raise ValueError("an admin key may use every adapter; leave adapters out")
        return self


class KeysFile(BaseModel):
    """What stands in a keys file."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    key: list[KeyEntry] = Field(min_length=1)


@dataclass(frozen=True)
class Key:
    """A key's digest, and who holds it."""

    digest: bytes = field(repr=False)
    caller: Caller


def read_keys(path: Path | None) -> tuple[Key, ...]:
    """The keys of the file and of the environment; none where neither has any, and then the server asks for none.

    Raises:
        ConfigError: naming the place and the remedy, never a key.
    """
    keys = [Key(_digest(name, os.environ[name]), caller) for name, caller in VARIABLES.items() if name in os.environ]
    if path is not None:
        for number, entry in enumerate(_parse(path), 1):
            keys.append(_key(f"{path}: key {number} ({entry.name})", entry))
    for one, other in combinations(keys, 2):
        if one.caller.name == other.caller.name:
            raise ConfigError(f"two keys are named {one.caller.name!r}; give each a name of its own")
        if one.digest == other.digest:
            raise ConfigError(f"{one.caller.name!r} and {other.caller.name!r} are one key; give each a key of its own")
    return tuple(keys)


def _parse(path: Path) -> list[KeyEntry]:
    try:
        return KeysFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).key
    except OSError as error:
        raise ConfigError(f"keys file {path} cannot be read ({error.strerror or error})") from None
    except ValidationError as error:  # before ValueError, which it is
        raise ConfigError(f"{path}: {_readable(error)}") from None
    except ValueError as error:
        line = re.search(r"\(at line \d+", str(error))  # the rest of the message can hold what stands there
        raise ConfigError(f"{path} is not TOML{f' {line[0]})' if line else ''}") from None


def _readable(error: ValidationError) -> str:
    """The first thing that is wrong, without what stands there: someone may take a key for a name or for a field."""
    first = error.errors(include_input=False, include_url=False)[0]
    loc, message = first["loc"], first["msg"].removeprefix("Value error, ")
    where = f"key {int(loc[1]) + 1}: " if len(loc) > 1 else ""
    if first["type"] == "extra_forbidden":
        name = str(loc[-1])
        shown = f" {name!r}" if len(name) < MIN_LENGTH else ""
        return f"{where}unknown field{shown}; known under [[key]]: {', '.join(KeyEntry.model_fields)}"
    if not where:
        return "it has no keys; write each as a table [[key]]"
    return f"{where}{f'{loc[2]}: ' if len(loc) > 2 else ''}{message[:1].lower()}{message[1:]}"


def _key(where: str, entry: KeyEntry) -> Key:
    caller = Caller(entry.name, tuple(entry.adapters), entry.admin)
    if entry.sha256 is not None:
        return Key(bytes.fromhex(entry.sha256), caller)
    if entry.env is not None:
        if entry.env not in os.environ:
            raise ConfigError(f"{where}: the variable that env names is not set")
        return Key(_digest(where, os.environ[entry.env]), caller)
    assert entry.key is not None, "KeyEntry has one of the three"
    return Key(_digest(where, entry.key.get_secret_value()), caller)


def _digest(where: str, key: str) -> bytes:
    if len(key) < MIN_LENGTH:
        raise ConfigError(f"{where}: a key has at least {MIN_LENGTH} characters; `openssl rand -hex 24` makes one")
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(f"{where}: a key has letters, digits and signs of ASCII, no spaces and no line ends")
    return hashlib.sha256(key.encode()).digest()
